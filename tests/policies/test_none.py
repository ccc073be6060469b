"""The rule that never freezes."""

from support.policies import cuts

from hf_freezecache.policies import NonePolicy


def test_none_never_freezes():
    assert cuts(NonePolicy(), 5) == [0] * 5
