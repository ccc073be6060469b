"""Whether the frozen prefix still is what its features were computed with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..model.chain import BlockChain

#: Values that are weighted together, so that the products take little memory.
_PART = 1 << 20
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class FrozenWatch:
    """Remembers the frozen prefix, and tells what has changed in it.

    Args:
        chain: the model, frozen at its cut.
    """

    def __init__(self, chain: BlockChain):
        self.cut = chain.cut
        self._model = chain.model
        self._parameters = chain.prefix_parameters(self.cut)
        self._state = chain.prefix_state(self.cut)
        self._values = {name: _of_this_process(tensor) for name, tensor in self._state.items()}
        self._modules = chain.prefix_modules(self.cut)
        self._names = {module: name for name, module in chain.model.named_modules()}
        self._versions = self._read_versions()
        self._checksums = checksums(self._values)

    def at_step(self) -> str | None:
        """What has changed, as a clause, as far as it costs next to nothing to see; None if nothing has."""
        for name, parameter in self._parameters.items():
            if parameter.requires_grad:
                return f"'{name}' was made trainable again"
        versions = self._read_versions()
        if versions == self._versions:
            return None
        written = [name for name in self._state if versions[name] != self._versions[name]]
        self._versions = versions
        return self._changed_value(written)

    def at_epoch(self) -> str | None:
        """What has changed, as a clause, replaced modules and all values included; None if nothing has."""
        modules = dict(self._model.named_modules())
        for module in self._modules:
            if modules.get(self._names[module]) is not module:
                return f"the module '{self._names[module]}' was replaced"
        tensors = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        for name, tensor in self._state.items():
            if tensors.get(name) is not tensor:
                return f"'{name}' was replaced by another tensor"
        return self.at_step() or self._changed_value(self._state)

    def _changed_value(self, names: Iterable[str]) -> str | None:
        now = checksums({name: self._values[name] for name in names})
        name = next((name for name, value in now.items() if self._checksums[name] != value), None)
        return None if name is None else f"the values of '{name}' were changed"

    def _read_versions(self) -> dict[str, int]:
        return {name: tensor._version for name, tensor in self._values.items()}


def _of_this_process(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds; it shares its memory, so that writing shows."""
    if not torch.distributed.is_available():
        return tensor
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def checksums(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """A number for each tensor that changes with its values and their order."""
    sums = [_sum_of_bits(tensor) for tensor in tensors.values()]
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for value in sums:
        by_device.setdefault(value.device, []).append(value)
    read = {device: iter(torch.stack(values).tolist()) for device, values in by_device.items()}  # one transfer each
    return {name: next(read[value.device]) for name, value in zip(tensors, sums, strict=True)}


def _sum_of_bits(tensor: torch.Tensor) -> torch.Tensor:
    values = tensor.detach().contiguous()
    if not values.numel():
        return torch.zeros((), dtype=torch.int64, device=values.device)
    if values.is_complex():
        values = torch.view_as_real(values)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for part in values.view(_BITS[values.element_size()]).reshape(-1).split(_PART):
        places = torch.arange(1, len(part) + 1, device=part.device)
        total = 31 * total + (part.to(torch.int64) * places).sum()  # of 64 bits, whatever overflows
    return total
