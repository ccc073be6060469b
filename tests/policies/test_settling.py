"""Verdicts on single blocks become a cut."""

import pytest
import torch
from support.observations import moment, with_gradients

from hf_freezecache.policies.settling import SettlingPolicy, tensor_from_text, tensor_to_text


class Nothing(SettlingPolicy):
    def look(self, moment, blocks):
        self.looked = [block.index for block in blocks]


def test_blocks_that_something_else_has_frozen_are_decided():
    """Else the verdict on the first live block would be taken as one on the stem."""
    policy = Nothing(1.0)
    policy.start(4)
    policy.observe(moment(3, cut=2), with_gradients([1.0, 1.0], first=2))
    assert policy.settled == 2 and policy.looked == [2, 3]
    policy.settle([True, False])
    assert policy.settled == 3


def test_a_block_freezes_with_those_before_it_alone():
    policy = Nothing(0.75)
    policy.start(8)
    for verdicts, expected in (([True, False, True], 1), ([False, True], 1), ([True, True], 3), ([True] * 5, 6)):
        policy.settle(verdicts)
        assert policy.settled == expected  # 6 of 8 are all that may freeze
    policy.start(8)
    assert policy.settled == 0


def test_tensors_are_kept_bit_for_bit():
    value = torch.tensor([[1 / 3, float("nan")], [-0.0, 1e-42]])
    again = tensor_from_text(tensor_to_text(value))
    assert again.dtype == torch.float32 and torch.equal(again.view(torch.int32), value.view(torch.int32))
    with pytest.raises(TypeError, match="float64"):
        tensor_to_text(value.double())
