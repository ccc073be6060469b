"""The weights of the frozen prefix wait in the host's memory while steps do without them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..distributed import Announcer
from ..model.chain import BlockChain
from ..units import show_bytes

#: Type of the accelerators that read pinned memory of the host by its own address (CUDA and ROCm).
_READS_HOST = "cuda"


@dataclass(frozen=True)
class _Place:
    """Where a parameter waits.

    Args:
        host: its values in the host's memory, which the accelerator can read.
        view: the same memory as a tensor of the accelerator.
    """

    host: torch.Tensor
    view: torch.Tensor

    def check(self, values: torch.Tensor) -> None:
        """Reads the memory in the ways in which torch reads tensors: by a kernel, and by copies.

        Args:
            values: that must be found in it.

        Raises:
            RuntimeError: if others are.
        """
        for read in (self.view, self.view.clone(), self.view.cpu().to(values.device)):
            if not torch.equal(_bits(read), _bits(values)):
                raise RuntimeError("the accelerator does not read the host's memory as it is")


class Offloading:
    """Moves the frozen prefix out of the accelerator's memory for steps that bypass it, and back.

    What waits stays readable: a parameter becomes a tensor of the same device over pinned memory of the host, which
    the accelerator reads through the bus. So nothing can read a wrong value, and no code need know of it:
    `model.device`, a callback that runs the model, copies of the weights and checkpoints see what they would see, more
    slowly. What runs the prefix often (a build, an evaluation) has it brought back before.

    Args:
        chain: the model.
        announcer: is told what waits, or why nothing does.
        is_wanted: whether anything may be moved.
    """

    def __init__(self, chain: BlockChain, announcer: Announcer, is_wanted: bool):
        self._chain, self._announcer, self._is_wanted = chain, announcer, is_wanted
        self._places: dict[nn.Parameter, _Place] = {}  # kept: pinned memory is slow to get
        self._away: dict[nn.Parameter, _Place] = {}
        self._cut = 0

    @property
    def waiting(self) -> int:
        """Bytes that wait in the host's memory now."""
        return sum(place.host.nbytes for place in self._away.values())

    def hold(self, cut: int) -> None:
        """Has the weights of the prefix of a cut in the host's memory, and no others.

        Without enough of it, or where it cannot be read, everything stays on the accelerator from then on.

        Args:
            cut: frozen blocks that the steps from now on do not run; 0: they run all.
        """
        if cut == self._cut or not self._is_wanted:
            return
        self.bring_back()
        if cut == 0:
            return
        try:
            for parameter in self._movable(cut):
                self._away[parameter] = self._move(parameter)
        except (RuntimeError, TypeError) as error:  # what torch raises where memory is full, or not mapped
            self._is_wanted = False
            self.bring_back()
            self._announcer.failure("The frozen weights stay in the accelerator's memory", error)
            return
        if self._away:
            self._announcer.info(
                f"The weights of the frozen blocks, {show_bytes(self.waiting)}, wait in the host's memory while "
                "steps run on features."
            )
        self._cut = cut

    def bring_back(self) -> None:
        """Puts every weight back into the accelerator's memory."""
        for parameter, place in self._away.items():
            if parameter.data_ptr() == place.view.data_ptr():  # else somebody has put other memory there since
                parameter.data = place.host.to(parameter.device, copy=True)
        self._away.clear()
        self._cut = 0

    def close(self) -> None:
        """As `bring_back`; gives the host's memory back, too."""
        self.bring_back()
        if self._places and torch.cuda.is_available():
            torch.cuda.synchronize()  # nothing reads it any more
        self._places.clear()

    def _movable(self, cut: int) -> list[nn.Parameter]:
        """Frozen parameters that are read before the cut only, each the whole of its memory."""
        shared = {name for names in self._chain.shared_parameters(cut) for name in names}
        frozen = [value for name, value in self._chain.prefix_parameters(cut).items() if name not in shared]
        return [parameter for parameter in frozen if not parameter.requires_grad and self._is_movable(parameter)]

    def _is_movable(self, parameter: nn.Parameter) -> bool:
        if type(parameter) is not nn.Parameter or type(parameter.data) is not torch.Tensor:
            return False  # quantized or sharded ones keep more than their values
        whole = parameter.untyped_storage().nbytes() == parameter.nbytes  # flat memory of many is freed by all alone
        return parameter.device.type == _READS_HOST and whole and bool(parameter.nbytes)

    def _move(self, parameter: nn.Parameter) -> _Place:
        place = self._places.get(parameter)
        if place is None or _form(place.view) != _form(parameter):
            place = _Place(*map_host(parameter.data))
            place.host.copy_(parameter.data)
            place.check(parameter.data)
            self._places[parameter] = place
        else:
            place.host.copy_(parameter.data)
        parameter.data = place.view
        return place


class _DeviceArray:
    """Pinned memory of the host as an array of the accelerator, which reads it by the same address.

    Args:
        host: bytes.
    """

    def __init__(self, host: torch.Tensor):
        self.host = host  # kept as long as the array is
        self.__cuda_array_interface__ = {
            "shape": tuple(host.shape),
            "typestr": "|u1",
            "data": (host.data_ptr(), False),
            "version": 3,
        }


def map_host(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pinned memory of the host, and a tensor of the accelerator over the same memory.

    CUDA maps all pinned memory into the address space of its devices (CUDA C++ Programming Guide, "Unified Virtual
    Address Space").

    Args:
        values: dense, on the accelerator.

    Returns:
        Both of the shape, strides and dtype of `values`.

    Raises:
        RuntimeError: if there is not enough memory.
    """
    with torch.cuda.device(values.device):
        host = torch.empty(values.nbytes, dtype=torch.uint8, pin_memory=True)
        view = torch.as_tensor(_DeviceArray(host), device=values.device)
    as_values = (part.view(values.dtype).as_strided(values.shape, values.stride()) for part in (host, view))
    return tuple(as_values)  # type: ignore[return-value]  # two


def _form(values: torch.Tensor) -> tuple[Any, ...]:
    return values.dtype, values.device, values.shape, values.stride()


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().reshape(-1).view(torch.uint8)
