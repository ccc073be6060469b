"""What every rule has unless it says otherwise."""

from support.policies import Answers

from hf_freezecache.policies import Moment


def test_next_change_is_unknown_to_a_rule_that_does_not_say():
    assert Answers(1).next_change(Moment(0, 5, 0, 100, 1, 12)) is None
