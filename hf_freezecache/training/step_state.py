"""What a training step changes before its gradients: enough to run it again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..rng import RngState


class StepState:
    """Generators and buffers (BatchNorm statistics) before a step.

    Args:
        buffers: that the step may change: those of the blocks that are not frozen.
    """

    def __init__(self, buffers: Sequence[torch.Tensor]):
        self._rng = RngState()
        self._buffers = [(buffer, buffer.clone()) for buffer in buffers]

    def restore(self) -> None:
        """Puts them back."""
        self._rng.restore()
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)
