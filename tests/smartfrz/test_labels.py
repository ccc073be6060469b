"""By hindsight: from when on a block had settled."""

import numpy as np
import pytest

from hf_freezecache.smartfrz.labels import LabelRule

RULE = LabelRule(remaining=0.2, floor=0.0, window=1)


def labels(curve, rule=RULE):
    return rule.settled(np.array(curve)[:, None])[:, 0].tolist()


def test_settled_is_near_the_end_for_good():
    curve = [0.5, 0.95, 0.7, 0.85, 0.92, 0.95, 1.0]
    assert labels(curve) == [False] * 4 + [True] * 3  # near at 1 as well, but not for good


def test_near_is_relative_to_the_way_of_the_block():
    fast, slow = np.linspace(0.4, 1.0, 11), np.linspace(0.94, 1.0, 11)
    assert labels(fast) == labels(slow) == [False] * 8 + [True] * 3
    assert all(labels(slow, LabelRule(remaining=0.2, floor=0.1, window=1)))


def test_a_block_that_never_moved_has_settled_from_the_start():
    assert all(labels([1.0] * 6))


def test_single_readings_are_averaged():
    curve = [0.5, 0.9, 0.95, 0.89, 0.95, 1.0, 1.0]
    assert labels(curve) == [False] * 4 + [True] * 3
    assert labels(curve, LabelRule(remaining=0.2, floor=0.0, window=3)) == [False] * 3 + [True] * 4


def test_outputs_that_tell_nothing_apart_do_not_count_as_settled():
    assert not any(labels([np.nan] * 6))


@pytest.mark.parametrize("settings", [{"remaining": 1.5}, {"floor": -0.1}, {"window": 0}])
def test_impossible_rules_are_refused(settings):
    with pytest.raises(ValueError, match="remaining and floor are shares"):
        LabelRule(**settings)
