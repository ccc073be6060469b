"""What a training step changes before its gradients: enough to run it again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from ..distributed import syncs_buffers, without_buffer_sync
from ..rng import RngState


class StepState:
    """Generators and buffers (BatchNorm statistics) before a step.

    A process that runs its step again is alone: where DistributedDataParallel has sent buffers around before the
    forward pass, the others would not answer a second time.

    Args:
        buffers: that the step may change: those of the blocks that are not frozen.
        model: not wrapped.
        wrapped: the model as the training calls it.
    """

    def __init__(self, buffers: Sequence[torch.Tensor], model: nn.Module, wrapped: nn.Module):
        self._rng, self._model, self._wrapped = RngState(), model, wrapped
        self._buffers = [(buffer, buffer.clone()) for buffer in buffers]
        self._is_synced = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, the step runs for the first time."""
        if not syncs_buffers(self._wrapped):
            yield
            return

        def note(module: nn.Module, args: tuple) -> None:
            if not self._is_synced:
                self._is_synced, self._buffers = True, [(buffer, buffer.clone()) for buffer, _ in self._buffers]

        hook = self._model.register_forward_pre_hook(note)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Puts generators and buffers back; inside, the step runs again."""
        self._rng.restore()
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)
        with without_buffer_sync(self._wrapped) if self._is_synced else nullcontext():
            yield
