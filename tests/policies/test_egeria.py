"""Blocks whose plasticity has come to rest."""

import math

import pytest
import torch
from support.observations import moment, through_json, with_features

from hf_freezecache.policies import EgeriaPolicy


def walk(policy, movements, steps, epoch=1):
    generator = torch.Generator().manual_seed(0)
    start, way = (torch.randn(len(movements), 16, 8, generator=generator) for _ in range(2))
    for step in steps:
        features = [a + b * move(step) for a, b, move in zip(start, way, movements, strict=True)]
        policy.observe(moment(step, epoch), with_features(features[policy.settled :], policy.settled))


SETTLES = [lambda s: 1 - math.exp(-s / 2), lambda s: 1 - math.exp(-s / 40), lambda s: 0.0, lambda s: 0.0]


def test_a_block_freezes_when_the_slope_is_small_beside_its_first_ones():
    policy = EgeriaPolicy()
    policy.start(4)
    walk(policy, SETTLES, range(8))
    assert policy.settled == 0
    walk(policy, SETTLES, range(8, 20))
    assert policy.settled == 1  # the next one still changes, and holds back those behind it


def test_nothing_is_read_in_the_first_epoch():
    policy = EgeriaPolicy()
    policy.start(4)
    walk(policy, SETTLES, range(20), epoch=0)
    assert policy.settled == 0 and policy.state_dict() == {"settled": 0, "reference": {}, "plasticity": {}}


def test_memory_goes_on():
    policy = EgeriaPolicy()
    policy.start(4)
    walk(policy, SETTLES, range(9))
    resumed = through_json(policy, EgeriaPolicy())
    walk(policy, SETTLES, range(9, 20))
    walk(resumed, SETTLES, range(9, 20))
    assert resumed.state_dict() == policy.state_dict() and resumed.settled == 1


def test_unfreezing_is_refused_in_words():
    with pytest.raises(ValueError, match="unfreezing is not possible here.*Leave unfreeze at False"):
        EgeriaPolicy(unfreeze=True)
