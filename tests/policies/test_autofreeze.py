"""Gradients that have stopped to change."""

import pytest
from support.observations import moment, through_json, with_gradients

from hf_freezecache.policies import AutoFreezePolicy


def interval(policy, norms, first=0, step=0):
    """Five steps: an interval of a training of 40 steps and 4 epochs."""
    for number in range(5):
        policy.observe(moment(step + number), with_gradients(norms, first))


def started(blocks=4, **settings):
    policy = AutoFreezePolicy(**settings)
    policy.start(blocks)
    return policy


def test_front_blocks_below_the_median_change_freeze():
    policy = started()
    interval(policy, [1.0, 1.0, 1.0, 1.0])
    assert policy.settled == 0  # there is nothing to compare with yet
    interval(policy, [0.99, 1.02, 0.5, 0.4])  # changes .01, .02, .5, .6: the median is .26
    assert policy.settled == 2 and policy.decide(moment(10)) == 2
    interval(policy, [0.5, 0.4], first=2)  # nothing changes, and nothing is below the median
    assert policy.settled == 2


def test_a_block_that_changes_holds_back_those_behind_it():
    policy = started()
    interval(policy, [1.0, 1.0, 1.0, 1.0])
    interval(policy, [0.2, 1.0, 1.0, 1.0])
    assert policy.settled == 0


def test_blocks_that_are_decided_but_live_do_not_count():
    """Until the next epoch begins, or annealing ends."""
    policy = started(blocks=4, max_frozen=1.0)
    interval(policy, [1.0, 1.0, 1.0, 1.0])
    interval(policy, [1.0, 1.1, 1.5, 1.6])
    assert policy.settled == 2
    interval(policy, [1.0, 1.1, 1.51, 1.0])  # of the two others alone: .007 and .375
    assert policy.settled == 3


def test_norms_are_those_of_all_gradients_and_infinite_ones_do_not_count():
    policy = started()
    policy.observe(moment(0), with_gradients([5.0, float("inf"), float("nan")]))
    policy.observe(moment(1), with_gradients([5.0, 1.0, 2.0]))
    assert [float(value) for value in policy._sums.values()] == pytest.approx([10.0, 1.0, 2.0])


def test_blocks_without_trained_parameters_are_settled():
    policy = started()
    for norms in ([1.0, 1.0, 1.0], [1.0, 0.5, 0.4]):
        for number in range(5):
            blocks = with_gradients([0.0, *norms])
            for parameter in blocks[0].parameters.values():
                parameter.grad = None
            policy.observe(moment(number), blocks)
    assert policy.settled == 2


def test_memory_in_the_middle_of_an_interval_goes_on():
    policy = started()
    interval(policy, [1.0, 1.0, 1.0, 1.0])
    policy.observe(moment(5), with_gradients([1 / 3, 0.7, 0.1, 0.1]))
    resumed = through_json(policy, AutoFreezePolicy())
    for step in range(6, 10):
        for rule in (policy, resumed):
            rule.observe(moment(step), with_gradients([1.0, 0.9, 0.2, 0.3]))
    assert resumed.settled == policy.settled == 2 and resumed.state_dict() == policy.state_dict()


@pytest.mark.parametrize("intervals", [0, 1.5, True])
def test_impossible_intervals_are_refused(intervals):
    with pytest.raises(ValueError, match="intervals"):
        AutoFreezePolicy(intervals)
