"""Tensors in the outputs of modules."""

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from hf_freezecache.model.tracing import ChainError, accept_feature, find_tensor, first_tensor

FIRST, SECOND = torch.zeros(2, 3), torch.ones(2, 3)


@pytest.mark.parametrize(
    "output",
    [FIRST, (None, FIRST, SECOND), [[], FIRST], {"a": None, "b": (FIRST, SECOND)}, BaseModelOutput(FIRST, (SECOND,))],
)
def test_first_tensor_is_found_in_nested_outputs_and_replaced(output):
    assert find_tensor(output) is FIRST and first_tensor(output) is FIRST
    feature = torch.full((2, 3), 2.0)
    replaced = accept_feature(output, feature)
    assert type(replaced) is type(output) and find_tensor(replaced) is feature


@pytest.mark.parametrize("output", [None, (), {"loss": None}, (None, ["text", 3])])
def test_output_without_a_tensor_is_none_or_refused(output):
    assert find_tensor(output) is None
    with pytest.raises(ChainError, match=f"{type(output).__name__} holds none"):
        first_tensor(output)
