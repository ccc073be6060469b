"""Parameters that blocks share: whoever freezes one block freezes a part of another."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..rng import preserve_rng
from .tracing import Block, ChainError, eval_mode


def check_sharing(model: nn.Module, blocks: Sequence[Block], inputs: Mapping[str, Any]) -> None:
    """Checks that no trainable parameter is used by several blocks, or by a block and the head.

    Runs the model once and sees the memory that its operations read, so that it does not matter how a parameter is
    shared: under two names, as a view, or by a function of another module.

    Args:
        model: the model; left as it is.
        blocks: its blocks, in the order in which they run.
        inputs: a small batch of model inputs.

    Raises:
        ChainError: if one is; the message names the parameter, its users and the remedies.
    """
    parts = [block.name for block in blocks] + ["the head"]
    for parameter, used_at in _uses(model, blocks, inputs):
        first, last = min(used_at), max(used_at)
        if first < last:
            names = [name for name, other in model.named_parameters(remove_duplicate=False) if other is parameter]
            also = f" (also '{names[1]}')" if len(names) > 1 else ""
            raise ChainError(
                f"'{names[0]}'{also} of {type(model).__name__} is used by '{parts[first]}' and by '{parts[last]}': "
                "freezing the first would freeze a part of the second. Give each a parameter of its own (models of "
                "Transformers: tie_word_embeddings=False), set its requires_grad to False, or train with "
                "policy='none'."
            )


def _uses(
    model: nn.Module, blocks: Sequence[Block], inputs: Mapping[str, Any]
) -> Iterable[tuple[nn.Parameter, set[int]]]:
    """Every trainable parameter with the positions at which it is read: the block that has begun last."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    reads = _Reads({parameter.untyped_storage().data_ptr() for parameter in trainable})
    with preserve_rng(), torch.no_grad(), eval_mode(model), _following(blocks, reads), reads:
        model(**inputs)
    for parameter in trainable:
        used_at = reads.positions[parameter.untyped_storage().data_ptr()]
        if used_at:
            yield parameter, used_at


@contextlib.contextmanager
def _following(blocks: Sequence[Block], reads: _Reads) -> Iterator[None]:
    """Tells `reads` which block runs."""

    def begins(number: int):
        return lambda module, args: setattr(reads, "position", number)

    handles = [block.modules[0].register_forward_pre_hook(begins(number)) for number, block in enumerate(blocks)]
    last = blocks[-1].modules[-1]
    handles.append(last.register_forward_hook(lambda module, args, output: setattr(reads, "position", len(blocks))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Reads(TorchDispatchMode):
    """Notes at which position the memory of some tensors is read.

    Args:
        addresses: of the tensors' storages.
    """

    def __init__(self, addresses: set[int]):
        super().__init__()
        self.addresses, self.position = addresses - {0}, 0
        self.positions: dict[int, set[int]] = defaultdict(set)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in _tensors((args, kwargs or {})):
            address = tensor.untyped_storage().data_ptr()
            if address in self.addresses:
                self.positions[address].add(self.position)
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from _tensors(entry)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
