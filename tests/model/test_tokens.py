"""Where the tokens of a batch of texts are, and batches without some of their positions."""

import pytest
import torch

from hf_freezecache.model.tokens import (
    blank_padding,
    padded_sides,
    take_columns,
    take_text,
    token_mask,
    why_not_padded,
)

RIGHT = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()


def test_mask_of_a_batch_of_texts_is_its_attention_mask():
    tokens = torch.ones(3, 4, dtype=torch.int64)
    assert torch.equal(token_mask({"ids": tokens, "attention_mask": RIGHT.long()}, "ids"), RIGHT)


@pytest.mark.parametrize(
    "batch",
    [
        {"ids": torch.ones(3, 4, dtype=torch.int64)},
        {"ids": torch.ones(3, 4), "attention_mask": RIGHT},
        {"ids": torch.ones(3, 2, 4, dtype=torch.int64), "attention_mask": torch.ones(3, 2, 4)},
        {"ids": torch.ones(3, 2, 2, 4, dtype=torch.int64), "attention_mask": torch.ones(3, 2, 2, 4).bool()},
        {"ids": torch.ones(3, 4, dtype=torch.int64), "attention_mask": torch.ones(3, 1, 4, 4)},
        {"ids": torch.ones(3, 4, dtype=torch.int64), "attention_mask": torch.zeros(3, 4)},  # what is added to scores
        {"attention_mask": RIGHT},
    ],
    ids=[
        "no mask",
        "floats",
        "float mask of choices",
        "4 dimensions of tokens",
        "4 dimensions",
        "float mask",
        "no tokens",
    ],
)
def test_what_is_no_batch_of_texts_has_no_mask(batch):
    assert token_mask(batch, "ids") is None


@pytest.mark.parametrize(
    ("mask", "sides"),
    [
        (RIGHT, {"right"}),
        (RIGHT.flip(1), {"left"}),
        (torch.cat([RIGHT, RIGHT.flip(1)]), {"left", "right"}),
        (RIGHT[2:], set()),
        (torch.tensor([[1, 0, 1, 1]]).bool(), None),
        (torch.tensor([[0, 1, 1, 0]]).bool(), None),
    ],
)
def test_sides_that_are_padded(mask, sides):
    assert padded_sides(mask) == sides


def test_padding_that_counts_is_said_with_the_remedy():
    assert why_not_padded(RIGHT, {"right"}) is None
    assert "padding_side = 'right'" in why_not_padded(RIGHT.flip(1), {"right"})
    assert "between its tokens" in why_not_padded(torch.tensor([[1, 0, 1, 1]]).bool(), {"right", "left"})


def test_columns_are_taken_of_what_has_positions():
    batch = {"ids": torch.arange(12).reshape(3, 4), "boxes": torch.ones(3, 4, 2), "labels": torch.ones(3), "n": 4}
    taken = take_columns(batch, (4,), torch.tensor([0, 3]))
    assert taken["ids"].tolist() == [[0, 3], [4, 7], [8, 11]] and taken["boxes"].shape == (3, 2, 2)
    assert taken["labels"] is batch["labels"] and taken["n"] == 4


def test_columns_and_sides_of_several_texts_a_sample():
    mask = RIGHT.reshape(3, 1, 4).expand(3, 2, 4)
    batch = {"ids": torch.arange(24).reshape(3, 2, 4), "attention_mask": mask.long(), "scores": torch.ones(3, 4)}
    assert torch.equal(token_mask(batch, "ids"), mask) and padded_sides(mask) == {"right"}
    taken = take_columns(batch, (2, 4), slice(1, None))
    assert taken["ids"].tolist()[0] == [[1, 2, 3], [5, 6, 7]] and taken["scores"].shape == (3, 4)


def test_one_text_of_several_is_all_of_a_sample_without_its_padding():
    mask = torch.tensor([[[1, 1, 0], [0, 1, 1]], [[1, 1, 1], [1, 0, 0]]]).bool()
    batch = {"ids": torch.arange(12).reshape(2, 2, 3), "labels": torch.tensor([0, 1])}
    taken = take_text(batch, mask, 0, 1)
    assert taken["ids"].tolist() == [[[4, 5], [4, 5]]] * 2 and taken["labels"].tolist() == [0, 0]


@pytest.mark.parametrize("shape", [(3, 2, 4), (6, 4, 5), (3, 8, 5)], ids=["as the mask", "texts", "rows of a sample"])
def test_padding_of_several_texts_is_blanked(shape):
    mask = torch.stack([RIGHT, RIGHT.flip(1)], dim=1)
    blank = blank_padding(torch.ones(shape), mask)
    assert blank.sum() == mask.sum() * (5 if len(shape) == 3 and shape[2] == 5 else 1)


def test_padding_is_blanked_whatever_is_there():
    blank = blank_padding(torch.full((3, 4, 2), torch.nan), RIGHT)
    assert blank[~RIGHT].eq(0).all() and blank[RIGHT].isnan().all()
    scores = torch.ones(3, 2)
    assert blank_padding(scores, RIGHT) is scores
