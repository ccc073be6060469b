"""Rows of texts: what a store holds of them beside features, and their codes without padding."""

import pytest
import torch
from support.token_rows import Pad, Texts

from hf_freezecache.cache.codec import make_codec
from hf_freezecache.cache.rows import RowError
from hf_freezecache.cache.texts import checksums, decode_rows, place_tokens, split_rows, split_texts, why_other_texts
from hf_freezecache.model.layout import FeatureLayout
from hf_freezecache.model.tokens import TextInputs

LAYOUT = FeatureLayout((4,), None, 0, torch.float32, is_token=True)


TEXTS = TextInputs("input_ids", frozenset({"input_ids"}))


def split(rows):
    return split_texts(rows, TEXTS.of(rows.keys() - {"labels"} | {"input_ids"}))


def batch(side="right", width=None):
    return Pad(side, width)([*Texts(5)])


@pytest.mark.parametrize("other", [batch("left"), batch(width=40)])
def test_checksums_do_not_know_padding(other):
    assert torch.equal(split(batch()).columns["checksum"], split(other).columns["checksum"])


def test_checksums_know_tokens_and_their_order():
    mask = torch.ones(4, 3, dtype=torch.bool)
    sums = checksums({"input_ids": torch.tensor([[5, 6, 7], [6, 5, 7], [5, 6, 8], [5, 6, 7]])}, mask, TEXTS)
    assert len(set(sums.tolist())) == 3 and sums[0] == sums[3]
    one, longer = ({"input_ids": torch.zeros(1, width, dtype=torch.int64)} for width in (2, 3))
    assert checksums(one, mask[:1, :2], TEXTS) != checksums(longer, mask[:1], TEXTS)


@pytest.mark.parametrize(
    "changed",
    [
        lambda rows: rows["token_type_ids"].__setitem__((3, 1), 1),
        lambda rows: rows["bbox"].__setitem__((3, 0, 2), 9),
        lambda rows: rows["pixel_values"].__setitem__((3, 0, 1, 1), -0.25),
        lambda rows: rows["names"].__setitem__(3, "other"),
    ],
    ids=["of a position", "several of a position", "an image", "a string"],
)
def test_checksums_know_all_that_the_frozen_blocks_read(changed):
    def rows():
        made = batch()
        beside = {"token_type_ids": torch.zeros_like(made["input_ids"]), "pixel_values": torch.zeros(5, 3, 2, 2)}
        return {**made, **beside, "bbox": torch.zeros(*made["input_ids"].shape, 4), "names": [*"abcde"], "scale": 2}

    other = rows()
    changed(other)
    differ = split(rows()).columns["checksum"] != split(other).columns["checksum"]
    assert differ.tolist() == [False, False, False, True, False]
    assert torch.equal(split_texts(rows(), TEXTS).columns["checksum"], split_texts(other, TEXTS).columns["checksum"])


def test_what_is_read_and_not_in_the_batch_is_refused():
    """What `_prepare_inputs` makes under another name could change unseen."""
    with pytest.raises(RowError, match="read 'token_type_ids', which the collator does not return"):
        split_texts(batch(), TEXTS.of({"input_ids", "token_type_ids"}))


def test_checksums_do_not_know_labels_nor_what_is_at_padding():
    one, other = batch(), batch()
    other["labels"] += 1
    other["input_ids"][~other["attention_mask"].bool()] = 7
    assert torch.equal(split(one).columns["checksum"], split(other).columns["checksum"])


def test_checksums_know_which_text_of_a_sample_a_token_is_of():
    tokens = torch.tensor([[[5, 6, 0], [7, 0, 0]], [[5, 0, 0], [6, 7, 0]], [[5, 6, 0], [7, 0, 0]]])
    sums = split_texts({"input_ids": tokens, "attention_mask": (tokens > 0).long()}, TEXTS).columns
    assert sums["tokens"].tolist() == [3, 3, 3]
    assert sums["checksum"][0] == sums["checksum"][2] != sums["checksum"][1]


def test_a_batch_without_a_mask_is_refused():
    tokens = batch()["input_ids"]
    with pytest.raises(RowError, match="attention_mask"):
        split({"input_ids": tokens})


def test_other_texts_are_seen():
    made = split_texts(batch(), TEXTS.of({"input_ids"}), {"right"})
    codes = {**made.columns, **made.constants}
    assert why_other_texts(codes, batch(width=20), TEXTS) is None
    assert "padded on the left" in why_other_texts(codes, batch("left"), TEXTS)
    assert why_other_texts({**codes, "padding": "left,right"}, batch("left"), TEXTS) is None
    changed = batch()
    changed["input_ids"][2, 1] += 1
    assert "other tokens" in why_other_texts(codes, changed, TEXTS)
    assert "3 rows for 5" in why_other_texts(codes, Pad()([*Texts(3)]), TEXTS)
    assert "attention_mask" in why_other_texts(codes, {"input_ids": changed["input_ids"]}, TEXTS)


@pytest.mark.parametrize("side", ["right", "left"])
def test_codes_come_back_where_the_tokens_are(side):
    mask = batch(side)["attention_mask"].bool()
    features = torch.randn(*mask.shape, 4, generator=torch.Generator().manual_seed(0))
    codec = make_codec("fp32", LAYOUT)
    codes = codec.encode(features[mask])
    decoded = decode_rows(codec, {"base": place_tokens(codes["base"], mask), "attention_mask": mask})
    assert torch.equal(decoded[mask], features[mask]) and decoded[~mask].eq(0).all()


def test_rows_of_a_store_are_padded_on_the_right():
    rows = split_rows({"base": torch.tensor([[1], [2], [3]]), "tokens": torch.tensor([2, 0, 1])})
    assert rows["base"][0, :, 0].tolist() == [1, 2] and rows["base"][2, 0, 0] == 3
    assert rows["attention_mask"].tolist() == [[True, True], [False, False], [True, False]]
