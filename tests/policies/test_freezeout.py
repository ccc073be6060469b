"""Blocks freeze one after the other."""

import pytest
from support.policies import cuts

from hf_freezecache import FreezeCacheConfig
from hf_freezecache.policies import FreezeOutPolicy, Moment
from hf_freezecache.training.settings import make_policy


def test_block_i_freezes_at_its_share_of_what_follows_the_first_freeze():
    policy = FreezeOutPolicy(start=0.5, max_frozen=1.0)
    assert [(point.when, point.cut) for point in policy.points(4)] == [(0.5, 1), (0.625, 2), (0.75, 3), (0.875, 4)]
    assert cuts(policy, 8, blocks=4) == [0, 0, 0, 0, 1, 2, 3, 4]
    assert policy.changes(4, 8) == [(4, 1), (5, 2), (6, 3), (7, 4)]
    assert policy.next_change(Moment(4, 8, 0, 100, 1, 4)) == 5


def test_cubed_fractions_freeze_earlier_and_in_the_same_order():
    linear, cubed = (FreezeOutPolicy(0.5, cubed=cubed, max_frozen=1.0).points(4) for cubed in (False, True))
    assert [point.when for point in cubed] == pytest.approx([point.when**3 for point in linear])


def test_no_more_freezes_than_the_settings_allow():
    policy = make_policy(FreezeCacheConfig(policy="freezeout", freeze_start=0.8, max_frozen=0.5))
    assert max(cuts(policy, 50, blocks=12)) == 6
    assert policy.describe() == "freezeout, freeze_start=0.8, cubed=False, max_frozen=0.5"
