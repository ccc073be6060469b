"""Rows of texts: what a store holds of them beside features, and their codes without padding."""

import pytest
import torch
from support.token_rows import Pad, Texts

from hf_freezecache.cache.codec import make_codec
from hf_freezecache.cache.rows import RowError
from hf_freezecache.cache.texts import checksums, decode_rows, place_tokens, split_rows, split_texts, why_other_texts
from hf_freezecache.model.layout import FeatureLayout

LAYOUT = FeatureLayout((4,), None, 0, torch.float32, is_token=True)


def batch(side="right", width=None):
    return Pad(side, width)([*Texts(5)])


@pytest.mark.parametrize("other", [batch("left"), batch(width=40)])
def test_checksums_do_not_know_padding(other):
    assert torch.equal(
        split_texts(batch(), "input_ids").columns["checksum"], split_texts(other, "input_ids").columns["checksum"]
    )


def test_checksums_know_tokens_and_their_order():
    mask = torch.ones(4, 3, dtype=torch.bool)
    sums = checksums(torch.tensor([[5, 6, 7], [6, 5, 7], [5, 6, 8], [5, 6, 7]]), mask)
    assert len(set(sums.tolist())) == 3 and sums[0] == sums[3]
    assert checksums(torch.tensor([[0, 0]]), mask[:1, :2]) != checksums(torch.tensor([[0, 0, 0]]), mask[:1])


def test_a_batch_without_a_mask_is_refused():
    tokens = batch()["input_ids"]
    with pytest.raises(RowError, match="attention_mask"):
        split_texts({"input_ids": tokens}, "input_ids")


def test_other_texts_are_seen():
    codes = split_texts(batch(), "input_ids").columns
    assert why_other_texts(codes, batch("left"), "input_ids") is None
    changed = batch()
    changed["input_ids"][2, 1] += 1
    assert "other tokens" in why_other_texts(codes, changed, "input_ids")
    assert "3 rows for 5" in why_other_texts(codes, Pad()([*Texts(3)]), "input_ids")
    assert "attention_mask" in why_other_texts(codes, {"input_ids": changed["input_ids"]}, "input_ids")


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
    assert rows["base"][:, :, 0].tolist() == [[1, 2], [0, 0], [3, 0]]
    assert rows["attention_mask"].tolist() == [[True, True], [False, False], [True, False]]
