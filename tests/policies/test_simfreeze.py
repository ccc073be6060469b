"""Blocks that stand still relative to where they began."""

import pytest
import torch
from support.observations import moment, through_json, with_features, with_gradients

from hf_freezecache.policies import SimFreezePolicy


def walk(policy, movements, steps):
    """The features of each block, in every reading, moved by what a function of the reading says."""
    generator = torch.Generator().manual_seed(0)
    start, way = (torch.randn(len(movements), 16, 8, generator=generator) for _ in range(2))
    for step in steps:
        features = [a + b * move(step) for a, b, move in zip(start, way, movements, strict=True)]
        policy.observe(moment(step), with_features(features[policy.settled :], policy.settled))
        policy.observe(moment(step), with_gradients([1.0] * 4))  # a step without a reading


def test_blocks_freeze_when_their_similarity_to_the_start_stands_still():
    policy = SimFreezePolicy()
    policy.start(4)
    movements = [lambda s: min(s, 4) / 4, lambda s: min(s, 7) / 4, lambda s: s / 4, lambda s: 0]
    walk(policy, movements, range(7))
    assert policy.settled == 0
    walk(policy, movements, [7])  # 4 to 7: three changes of nothing
    assert policy.settled == 1
    walk(policy, movements, range(8, 11))
    assert policy.settled == 2


def test_memory_goes_on():
    policy = SimFreezePolicy()
    policy.start(4)
    movements = [lambda s: min(s, 4) / 4, lambda s: s / 4, lambda s: s / 4, lambda s: 0]
    walk(policy, movements, range(6))
    resumed = through_json(policy, SimFreezePolicy())
    walk(policy, movements, [6, 7])
    walk(resumed, movements, [6, 7])
    assert resumed.state_dict() == policy.state_dict() and resumed.settled == 1


@pytest.mark.parametrize("settings", [{"tolerance": 0}, {"window": 0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match="must be more than 0"):
        SimFreezePolicy(**settings)
