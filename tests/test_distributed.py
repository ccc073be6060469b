"""Processes that train together."""

import pytest

from hf_freezecache.distributed import Group


def test_failure_of_one_process_is_everybodys():
    class Second(Group):
        def gather(self, value):
            return [("ValueError", "sample 3"), value]

    with pytest.raises(ValueError, match="process 0: sample 3"):
        Second(rank=1, size=2).on_all(lambda: None)
    with pytest.raises(KeyError, match="mine"):
        Second(rank=1, size=2).on_all(lambda: {}["mine"])
