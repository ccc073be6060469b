"""What a training step changes before its gradients: enough to run it again."""

from __future__ import annotations

import torch
from torch import nn

from ..rng import RngState


class StepState:
    """Generators and buffers (BatchNorm statistics) before a step.

    Args:
        model: whose buffers count; those of frozen blocks do not change.
    """

    def __init__(self, model: nn.Module):
        self._rng = RngState()
        self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if buffer.is_floating_point()]

    def restore(self) -> None:
        """Puts them back."""
        self._rng.restore()
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)
