"""The shape of a feature: what contradicts itself, and how it is written down."""

import pytest
import torch
from hypothesis import given
from support.codec_cases import EXAMPLES, layouts

from hf_freezecache.model.layout import FeatureLayout, from_positions, to_positions


@EXAMPLES
@given(layouts())
def test_layout_survives_json(layout):
    assert FeatureLayout.from_json(layout.to_json()) == layout
    assert layout.values == layout.channels * (layout.positions + layout.special_tokens)


@pytest.mark.parametrize(
    "shape, grid, special, dtype, message",
    [
        ((), None, 0, torch.float32, "positive sizes"),
        ((3, 0), None, 0, torch.float32, "positive sizes"),
        ((1, 2, 3, 4), None, 0, torch.float32, "positive sizes"),
        ((3, 4), None, 3, torch.float32, "0 to 2 leading special tokens"),
        ((3, 4, 4), None, 1, torch.float32, "0 to 0 leading special tokens"),
        ((5, 4), (2, 2), 0, torch.float32, "does not cover the 5 positions"),
        ((3, 4), None, 0, torch.int64, "float32, float16, bfloat16"),
    ],
)
def test_contradictory_layout_is_refused(shape, grid, special, dtype, message):
    with pytest.raises(ValueError, match=message):
        FeatureLayout(shape, grid, special, dtype)


@pytest.mark.parametrize("flag", ["is_token", "is_trimmed"])
def test_flags_of_a_layout_are_written_where_they_are_true(flag):
    shape = (4,) if flag == "is_token" else (3, 4)
    plain, flagged = (FeatureLayout(shape, None, 0, torch.float32, **{flag: value}) for value in (False, True))
    assert flag not in plain.to_json() and flagged.to_json()[flag] is True
    assert FeatureLayout.from_json(flagged.to_json()) == flagged != plain


def test_features_of_tokens_have_no_width_to_trim():
    with pytest.raises(ValueError, match="no width to trim"):
        FeatureLayout((4,), None, 0, torch.float32, is_token=True, is_trimmed=True)


@pytest.mark.parametrize(("shape", "positions"), [((5, 3), 5), ((3, 4, 2), 8), ((3,), 1)])
def test_features_as_vectors_of_their_positions_and_back(shape, positions):
    features = torch.randn(2, *shape)
    vectors = to_positions(features)
    assert vectors.shape == (2, positions, 3) and torch.equal(from_positions(vectors, shape), features)
