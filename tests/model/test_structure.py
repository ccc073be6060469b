"""Tensors in the arguments and outputs of calls."""

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from hf_freezecache.model.errors import ChainError
from hf_freezecache.model.structure import find_tensor, first_tensor, leaves, map_leaves

FIRST, SECOND = torch.zeros(2, 3), torch.ones(2, 3)


@pytest.mark.parametrize(
    "output",
    [FIRST, (None, FIRST, SECOND), [[], FIRST], {"a": None, "b": (FIRST, SECOND)}, BaseModelOutput(FIRST, (SECOND,))],
)
def test_first_tensor_is_found_in_nested_outputs_and_replaced(output):
    assert find_tensor(output) is FIRST and first_tensor(output) is FIRST
    feature = torch.full((2, 3), 2.0)
    place = next(path for path, tensor in leaves(output) if tensor is FIRST)
    replaced = map_leaves(lambda path, leaf: feature if path == place else leaf, output)
    assert type(replaced) is type(output) and find_tensor(replaced) is feature
    assert [path for path, _ in leaves(replaced)] == [path for path, _ in leaves(output)]


@pytest.mark.parametrize("output", [None, (), {"loss": None}, (None, ["text", 3])])
def test_output_without_a_tensor_is_none_or_refused(output):
    assert find_tensor(output) is None
    with pytest.raises(ChainError, match=f"{type(output).__name__} holds none"):
        first_tensor(output)
