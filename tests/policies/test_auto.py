"""A schedule that a trial chooses."""

import json

import pytest

from hf_freezecache.policies import AutoPolicy, Moment, Trial


def trial(frozen, live):
    return Trial(10, 12, 64, frozen, live)


def cuts(policy, epochs, blocks):
    return [policy.decide(Moment(epoch, epochs, 0, 100, 0, blocks)) for epoch in range(epochs)]


def chosen(found, **settings):
    policy = AutoPolicy(**settings)
    policy.start(13)
    why = policy.take_trial(found, 13)
    return policy, why


def test_where_frozen_blocks_are_better_some_are_frozen_from_the_start():
    policy, why = chosen(trial([0.5, 0.52], [0.6, 0.6]))
    assert cuts(policy, 4, 13) == [6] * 4  # two thirds of round(.75 * 13)
    assert "0.51" in why and "0.6" in why and "-0.09" in why and "from the start" in why


@pytest.mark.parametrize("frozen", [[0.7, 0.7], [0.6, 0.6], [0.3, 0.8]], ids=["worse", "as good", "within the error"])
def test_where_they_are_not_the_early_blocks_adapt_first(frozen):
    policy, why = chosen(trial(frozen, [0.6, 0.6]))
    assert cuts(policy, 4, 13) == [0, 0, 10, 10]
    assert cuts(policy, 9, 13) == [0] * 5 + [10] * 4
    assert "late" in why


def test_without_a_trial_it_is_careful():
    policy, why = chosen(None)
    assert cuts(policy, 4, 13) == [0, 0, 10, 10] and "too short" in why


def test_its_fractions_are_those_of_the_settings():
    policy, _ = chosen(trial([1.0], [0.5]), max_frozen=0.5, end=0.25)
    assert policy.trial_cut(13) == 6 and cuts(policy, 8, 13) == [0, 0] + [6] * 6


def test_what_is_chosen_is_remembered_and_forgotten():
    policy, _ = chosen(trial([0.5], [0.6]))
    resumed = AutoPolicy()
    resumed.load_state_dict(policy.state_dict())
    assert cuts(resumed, 4, 13) == cuts(policy, 4, 13) and resumed.why == policy.why
    policy.start(13)
    assert policy.changes(13, 4) is None
    with pytest.raises(RuntimeError, match="trial"):
        cuts(policy, 4, 13)


def test_the_error_of_the_difference_is_that_of_its_batches():
    found = trial([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    assert found.difference == 1.0 and found.error == pytest.approx(1 / 3**0.5)
    assert trial([1.0], [0.5]).error == 0.0


def test_a_resumed_training_without_a_choice_is_careful():
    policy = AutoPolicy()
    policy.start(13)
    policy.load_state_dict({"points": [1, 2], "settled": 3})  # of another rule
    assert policy.choice() is None
    why = policy.skip_trial(13)
    assert cuts(policy, 4, 13) == [0, 0, 10, 10] and "10 of 13" in why
    assert (policy.choice().schedule, policy.choice().why, policy.choice().numbers) == ("0.5:10", why, {})
    assert policy.skip_trial(13) is None


def test_a_resumed_training_keeps_its_choice():
    first, why = chosen(trial([0.5], [0.6]))
    policy = AutoPolicy()
    policy.start(13)
    policy.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert policy.skip_trial(13) is None and policy.choice() == first.choice()
    assert policy.choice().why == why and policy.choice().numbers["difference"] == pytest.approx(-0.1)


def test_numbers_of_a_training_that_diverged_are_left_out():
    policy, _ = chosen(trial([0.5], [float("nan")]))
    assert cuts(policy, 4, 13) == [0, 0, 10, 10]
    numbers = policy.choice().numbers
    assert numbers["live_loss"] is None and numbers["difference"] is None and numbers["frozen_loss"] == 0.5
