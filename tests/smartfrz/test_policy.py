"""The rule asks a predictor."""

import pytest
import torch
from support.observations import moment, through_json
from support.predictors import ByDrift
from torch import nn

from hf_freezecache.policies import ObservedBlock
from hf_freezecache.policies.settling import tensor_from_text, tensor_to_text
from hf_freezecache.smartfrz import SmartFrzPolicy
from hf_freezecache.smartfrz.history import NUM_FEATURES


class Walk:
    """A made-up training of four blocks, each of which goes its way until its own step."""

    def __init__(self, until):
        generator = torch.Generator().manual_seed(0)
        self.until = until
        self.start, self.way = (torch.randn(len(until), 40, 40, generator=generator) for _ in range(2))

    def blocks(self, step, first):
        for index in range(first, len(self.until)):
            weight = self.start[index] + min(step, self.until[index]) * 0.01 * self.way[index]
            yield ObservedBlock(index, f"block.{index}", {"0.weight": nn.Parameter(weight)}, None)

    def run(self, policy, steps):
        for step in steps:
            policy.observe(moment(step, max_steps=60), list(self.blocks(step, policy.settled)))


def started(**settings):
    policy = SmartFrzPolicy(ByDrift(window=8), **settings)
    policy.start(4)
    return policy


def test_blocks_freeze_when_half_of_the_last_verdicts_say_so():
    policy, walk = started(), Walk([10, 30, 20, 60])
    walk.run(policy, range(12))
    assert policy.settled == 0
    walk.run(policy, range(12, 14))  # verdicts of steps 11 and 12: two of four
    assert policy.settled == 1
    walk.run(policy, range(14, 31))
    assert policy.settled == 1  # the third has settled, and waits for the second
    walk.run(policy, range(31, 34))
    assert policy.settled == 3 and policy.decide(moment(34)) == 3


def test_no_more_freeze_than_the_settings_allow_and_none_before_some_snapshots():
    policy, walk = started(max_frozen=0.25), Walk([1, 1, 1, 1])
    walk.run(policy, range(8))
    assert policy.settled == 0
    walk.run(policy, range(8, 30))
    assert policy.settled == 1


def test_what_is_not_trained_has_settled_and_is_not_looked_at():
    policy, walk = started(), Walk([1, 60, 60, 60])
    for step in range(12):
        blocks = list(walk.blocks(step, policy.settled))
        for block in blocks[: 1 - policy.settled]:
            block.parameters["0.weight"].requires_grad_(False)
        policy.observe(moment(step, max_steps=60), blocks)
    assert policy.settled == 1 and 0 not in policy._histories


@pytest.mark.parametrize("step", [3, 12, 20])
def test_memory_goes_on(step):
    policy, walk = started(), Walk([10, 30, 20, 60])
    walk.run(policy, range(step))
    resumed = through_json(policy, SmartFrzPolicy(ByDrift(window=8)))
    assert resumed.state_dict() == policy.state_dict()
    walk.run(policy, range(step, 40))
    walk.run(resumed, range(step, 40))
    assert resumed.state_dict() == policy.state_dict() and policy.settled == 3


def test_memory_of_other_values_is_refused():
    policy, walk = started(), Walk([10, 30, 20, 60])
    walk.run(policy, range(3))
    state = policy.state_dict()
    snapshots = tensor_from_text(state["histories"]["2"]["snapshots"])
    state["histories"]["2"]["snapshots"] = tensor_to_text(snapshots[:, 1:])
    with pytest.raises(ValueError, match=f"have {NUM_FEATURES - 1} values, and those of this version .* Resume with"):
        started().load_state_dict(state)


def test_steps_between_snapshots_cost_nothing():
    policy = started()
    policy.observe(moment(7, max_steps=600), [])
    with pytest.raises(AttributeError):
        policy.observe(moment(10, max_steps=600), [None])  # the tenth is looked at


def test_a_new_training_begins_anew():
    policy, walk = started(), Walk([0, 0, 0, 0])
    walk.run(policy, range(20))
    policy.start(4)
    assert policy.state_dict() == {"settled": 0, "snapshot": 0, "histories": {}}


@pytest.mark.parametrize("settings", [{"threshold": 1.0}, {"votes": 0}, {"least": 1}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match="is a confidence, between 0 and 1"):
        SmartFrzPolicy(ByDrift(), **settings)
