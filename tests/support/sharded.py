"""FSDP on CPUs: accelerate shards models on accelerators alone, though PyTorch does so with gloo too."""

from __future__ import annotations

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn


def shard_on_cpus() -> None:
    """From now on, accelerate takes several processes on CPUs for ones that may shard their model."""
    initialize = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = init


class _Layer(nn.Module):
    """A layer that adds a table of positions, which the first one makes for all."""

    def __init__(self, is_first: bool):
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.table = nn.Embedding(64, 32) if is_first else None

    def forward(self, hidden, positions=None):
        if self.table is not None:
            positions = self.table(torch.arange(hidden.shape[1], device=hidden.device))
        return hidden + torch.relu(self.linear(hidden + positions)), positions


class SharesPositions(nn.Module):
    """A classifier of images of 16 by 16 pixels; a part of its first layer runs in replay epochs, too."""

    main_input_name = "pixel_values"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(48, 32)
        self.layers = nn.ModuleList(_Layer(number == 0) for number in range(4))
        self.head = nn.Linear(32, 5)

    def forward(self, pixel_values, labels=None):
        hidden, positions = self.stem(pixel_values.reshape(len(pixel_values), 16, 48)), None
        for layer in self.layers:
            hidden, positions = layer(hidden, positions)
        logits = self.head(hidden.mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}
