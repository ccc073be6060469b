"""By hindsight: from when on a block had settled."""

import numpy as np
import pytest

from hf_freezecache.smartfrz.labels import LabelRule


def test_settled_is_near_the_end_and_calm_for_good():
    curve = np.array([0.1, 0.85, 0.9, 0.4, 0.85, 0.88, 0.9, 0.95, 1.0])
    labels = LabelRule(level=0.8, spread=0.1, window=2).settled(curve[:, None])
    assert labels[:, 0].tolist() == [False] * 5 + [True] * 4  # calm at 2 as well, but not for good


def test_a_block_that_is_calm_far_from_its_end_has_not_settled():
    assert not LabelRule(window=2).settled(np.array([[0.5]] * 8 + [[1.0]]))[:-1].any()


def test_a_block_that_never_moved_has_settled_when_a_window_has_been_seen():
    assert LabelRule(window=3).settled(np.ones((6, 1)))[:, 0].tolist() == [False] * 2 + [True] * 4


def test_outputs_that_tell_nothing_apart_do_not_count_as_settled():
    curves = np.full((6, 1), np.nan)
    assert not LabelRule().settled(curves).any()


@pytest.mark.parametrize("settings", [{"level": 1.5}, {"spread": 0.0}, {"window": 0}])
def test_impossible_rules_are_refused(settings):
    with pytest.raises(ValueError, match="level is from 0 to 1"):
        LabelRule(**settings)
