"""Rules around a rule: decisions that wait for their freeze, and blocks that are frozen in any case."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.policies import EXAMPLES, Answers, cuts

from hf_freezecache.policies import (
    AutoPolicy,
    ComingFreeze,
    DelayedPolicy,
    FrozenFromStart,
    LinearPolicy,
    ManualPolicy,
    Moment,
)


class OneMore(Answers):
    """Decides for one block more than the cut, in every epoch."""

    def decide(self, moment):
        return moment.cut + 1


def test_a_decision_is_a_freeze_some_epochs_later():
    policy = DelayedPolicy(Answers(0, 2, 1, 5, 5, 5), 2)
    assert cuts(policy, 6) == [0, 0, 0, 2, 2, 5]
    assert policy.coming(12, 6) == [ComingFreeze(2, 1, 3), ComingFreeze(5, 3, 5)]
    assert policy.changes(12, 6) is None
    assert (
        policy.next_change(Moment(3, 6, 0, 100, 2, 12)) == 5 and policy.next_change(Moment(5, 6, 0, 9, 5, 12)) is None
    )


def test_a_rule_decides_on_while_a_freeze_is_coming():
    assert cuts(DelayedPolicy(OneMore(), 3), 6) == [0, 0, 0, 1, 2, 3]


def test_what_waits_is_part_of_the_state():
    first, second = (DelayedPolicy(Answers(0, 2, 2, 4, 4, 4), 2) for _ in range(2))
    whole = cuts(DelayedPolicy(Answers(0, 2, 2, 4, 4, 4), 2), 6)
    for epoch in range(3):
        first.decide(Moment(epoch, 6, 0, 100, 0, 12))
    second.start(12)
    second.load_state_dict(first.state_dict())
    assert second.coming(12, 6) == first.coming(12, 6)
    assert [second.decide(Moment(epoch, 6, 0, 100, 0, 12)) for epoch in range(3, 6)] == whole[3:]
    assert second.policy.asked == [0, 1, 2, 3, 4, 5]
    other = DelayedPolicy(Answers(), 2)
    other.load_state_dict({"asked": [0, 1]})  # of a training without `anneal_epochs`
    assert other.policy.asked == [0, 1] and other.coming(12, 6) == []


def test_every_training_begins_anew():
    policy = DelayedPolicy(Answers(2, 2, 2), 1)
    assert cuts(policy, 3) == cuts(policy, 3) == [0, 2, 2]


@pytest.mark.parametrize("answer", ["2", None, -1, 13, True])
def test_answers_that_are_no_cuts_are_passed_on(answer):
    assert DelayedPolicy(Answers(answer), 1).decide(Moment(0, 6, 0, 100, 0, 12)) is answer
    if answer != 13:
        assert FrozenFromStart(Answers(answer), lambda blocks: 2, "").decide(Moment(0, 6, 0, 9, 0, 12)) is answer


@pytest.mark.parametrize("policy", [LinearPolicy(), AutoPolicy()])
def test_schedules_are_not_delayed(policy):
    with pytest.raises(ValueError, match="leave anneal_epochs"):
        DelayedPolicy(policy, 2).start(12)


def test_a_trial_is_that_of_the_rule_inside():
    policy = FrozenFromStart(AutoPolicy(), lambda blocks: 2, "why")
    assert policy.trial_cut(12) == 9 and policy.changes(12, 4) is None and policy.coming(12, 4) is None
    assert "too short for a trial" in policy.take_trial(None, 12)
    assert policy.changes(12, 4) == [(0, 2), (2, 9)]
    other = FrozenFromStart(AutoPolicy(), lambda blocks: 2, "why")
    other.load_state_dict(policy.state_dict())
    assert other.changes(12, 4) == [(0, 2), (2, 9)]


@EXAMPLES
@given(st.integers(0, 12), st.sampled_from(["1:2,3:5", "0:4", "2:1,4:12", "0.5:3"]))
def test_blocks_frozen_from_the_start_and_a_schedule_combine_by_maximum(cut, points):
    policy, plain = FrozenFromStart(ManualPolicy(points), lambda blocks: cut, "why"), ManualPolicy(points)
    decided = cuts(policy, 6)
    assert decided == [max(cut, other) for other in cuts(plain, 6)]
    changes = policy.changes(12, 6)
    assert [max([0, *(deeper for at, deeper in changes if at <= epoch)]) for epoch in range(6)] == decided
    coming = policy.coming(12, 6)
    assert [max([0, *(freeze.cut for freeze in coming if freeze.epoch <= epoch)]) for epoch in range(6)] == decided
    assert all(freeze.known_since == 0 for freeze in coming)
    following = [policy.next_change(Moment(epoch, 6, 0, 100, decided[epoch], 12)) for epoch in range(6)]
    for epoch, at in enumerate(following):
        deeper = [later for later in range(epoch + 1, 6) if decided[later] > decided[epoch]]
        assert at == min(deeper, default=None)


def test_blocks_frozen_from_the_start_and_a_rule_that_decides_as_the_training_goes():
    policy = FrozenFromStart(DelayedPolicy(Answers(0, 4, 4, 4), 2), lambda blocks: blocks // 4, "why")
    assert cuts(policy, 4) == [3, 3, 3, 4]
    assert policy.coming(12, 4) == [ComingFreeze(3, 0, 0), ComingFreeze(4, 1, 3)] and policy.changes(12, 4) is None
    assert policy.name == "Answers with why" and policy.describe().endswith("anneal_epochs=2, why")
