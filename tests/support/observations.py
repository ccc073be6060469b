"""Observed blocks that are made up, for rules that look at them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hf_freezecache.policies import FreezePolicy, Moment, ObservedBlock


def moment(step: int, epoch: int = 0, cut: int = 0, blocks: int = 4, max_steps: int = 40, epochs: int = 4) -> Moment:
    return Moment(epoch, epochs, step, max_steps, cut, blocks)


def with_gradients(norms: Sequence[float], first: int = 0) -> list[ObservedBlock]:
    """Blocks whose gradients, in two parameters, have these norms."""
    blocks = []
    for index, norm in enumerate(norms, start=first):
        parameters = {name: nn.Parameter(torch.zeros(2)) for name in ("0.weight", "0.bias")}
        parameters["0.weight"].grad = torch.tensor([0.6 * norm, 0.0])
        parameters["0.bias"].grad = torch.tensor([0.0, 0.8 * norm])
        blocks.append(ObservedBlock(index, f"block.{index}", parameters, None))
    return blocks


def with_features(features: Sequence[torch.Tensor], first: int = 0) -> list[ObservedBlock]:
    """Blocks whose outputs for a few samples are these."""
    from hf_freezecache.policies.cka import gram

    return [
        ObservedBlock(index, f"block.{index}", {}, None, gram(value))
        for index, value in enumerate(features, start=first)
    ]


def through_json(policy: FreezePolicy, other: FreezePolicy, blocks: int = 4) -> FreezePolicy:
    """Another policy with the memory of the first one, as a checkpoint keeps it."""
    import json

    other.start(blocks)
    other.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    return other
