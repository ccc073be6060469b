"""Freeze points that the user gives."""

import pytest
from support.policies import cuts

from hf_freezecache.policies import ManualPolicy


def test_manual_points_hold_from_their_epoch_on():
    assert cuts(ManualPolicy("1:4,3:8"), 5) == [0, 4, 4, 8, 8]
    assert cuts(ManualPolicy(" 1 : 4 , 3 : 8 "), 5) == [0, 4, 4, 8, 8]
    assert cuts(ManualPolicy("0:2"), 3) == [2, 2, 2]
    assert cuts(ManualPolicy("2:12"), 3) == [0, 0, 12]
    assert cuts(ManualPolicy("7:3"), 3) == [0, 0, 0]


def test_manual_cut_beyond_the_chain_is_refused_with_the_deepest():
    policy = ManualPolicy("1:4,3:14")
    policy.start(14)
    with pytest.raises(ValueError, match="cut 14.*13 blocks.*13"):
        policy.start(13)
