"""What a training step changes before its gradients: enough to run it again, on one process alone too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed import find_ddp
from ..rng import RngState

_Buffers = list[tuple[torch.Tensor, torch.Tensor]]


class StepState:
    """Generators and buffers (BatchNorm statistics) before a step.

    DistributedDataParallel sends the main process's buffers around before every forward pass. A process that runs its
    step again, where the others do not, would wait for them: it puts in once more what it got at the first try.

    Args:
        model: as the training calls it.
        buffers: that the step may change: those of the blocks that are not frozen.
    """

    def __init__(self, model: nn.Module, buffers: Sequence[torch.Tensor]):
        self._buffers, self._ddp = buffers, find_ddp(model)
        self._rng, self._before = RngState(), self._copy()
        # What the wrapper's forward passes of the first try have begun with.
        self._received: list[_Buffers] = []

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Around the first try."""
        if self._ddp is None or not self._before:
            yield
            return
        with _at_passes(self._ddp, lambda: None, lambda: self._received.append(self._copy())):
            yield

    @contextlib.contextmanager
    def repeating(self) -> Iterator[None]:
        """Around the second try, which begins as the first one did."""
        self._rng.restore()
        _put_back(self._before)
        if self._ddp is None or not self._received:
            yield
            return
        ddp, syncs, received = self._ddp, self._ddp.broadcast_buffers, iter(self._received)
        current: _Buffers | None = None

        def begin() -> None:
            nonlocal current
            current = next(received, None)
            ddp.broadcast_buffers = syncs and current is None

        try:
            with _at_passes(ddp, begin, lambda: _put_back(current or [])):
                yield
        finally:
            ddp.broadcast_buffers = syncs

    def _copy(self) -> _Buffers:
        return [(buffer, buffer.clone()) for buffer in self._buffers]


def _put_back(buffers: _Buffers) -> None:
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)


@contextlib.contextmanager
def _at_passes(ddp: DistributedDataParallel, before: Callable[[], None], after: Callable[[], None]) -> Iterator[None]:
    """Inside, two functions are called at every forward pass: before and after the wrapper sends buffers around."""
    is_wrappers = False

    def begin(*_: object) -> None:
        nonlocal is_wrappers
        is_wrappers = True
        before()

    def enter(*_: object) -> None:  # also where somebody calls the model without its wrapper
        nonlocal is_wrappers
        if is_wrappers:
            is_wrappers = False
            after()

    # Before hooks of the user's, which may be what fails.
    handles = [ddp.register_forward_pre_hook(begin), ddp.module.register_forward_pre_hook(enter, prepend=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
