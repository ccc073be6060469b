"""What is known of samples of several widths in a batch, whatever padding is beside them."""

import pytest
import torch

from hf_freezecache.cache.names import CHECKSUM, WIDEST
from hf_freezecache.cache.padded import PaddedEntry, PaddingRule, checksums, split_padded, why_other_samples
from hf_freezecache.cache.rows import RowError


def rule(side="right", size=(9,), **entries):
    entries = entries or {"values": PaddedEntry(0, 0.0), "mask": PaddedEntry(0, 0)}
    return PaddingRule("values", side, size, entries)


def batch(samples, width, side="right"):
    def pad(row):
        padding = row.new_zeros(width - len(row), *row.shape[1:])
        return torch.cat([row, padding] if side == "right" else [padding, row])

    rows = [torch.tensor(sample) for sample in samples]
    masks = [torch.ones(len(row), dtype=torch.int64) for row in rows]
    return {"values": torch.stack([pad(row) for row in rows]), "mask": torch.stack([pad(mask) for mask in masks])}


SAMPLES = [[1.0, 2.0, 3.0], [4.0, 0.0, 6.0, 7.0, 8.0]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_checksums_do_not_depend_on_the_width_of_the_batch(side):
    narrow, wide = (checksums(batch(SAMPLES, width, side), rule(side)) for width in (5, 9))
    assert torch.equal(narrow, wide) and narrow[0] != narrow[1]


@pytest.mark.parametrize(
    "changed",
    [[1.0, 2.0, 4.0], [2.0, 1.0, 3.0], [1.0, 2.0, 3.0, 3.0], [1.0, 2.0], [0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 0.0]],
    ids=["a value", "the order", "longer", "shorter", "later", "a zero at its end"],
)
def test_checksums_tell_samples_apart(changed):
    before, after = (checksums(batch([sample], 9), rule()) for sample in (SAMPLES[0], changed))
    assert before != after


def test_checksums_tell_sides_apart():
    for side in ("right", "left"):
        found = checksums(batch(SAMPLES, 9, side), rule())
        assert torch.equal(found, checksums(batch(SAMPLES, 9), rule())) == (side == "right")


def test_checksums_of_entries_of_several_dimensions_and_without_a_width():
    frames = torch.randn(2, 3, 9)
    frames[0, :, 6:] = 0
    entries = rule(values=PaddedEntry(1, 0.0), kind=None, name=None)
    others = {"kind": torch.tensor([1, 2]), "name": ["a", "b"]}
    whole = checksums({"values": frames, **others}, entries)
    alone = checksums({"values": frames[:1, :, :6], "kind": torch.tensor([1]), "name": ["a"]}, entries)
    assert whole[0] == alone[0]
    assert whole[0] != checksums({"values": frames, **others, "name": ["c", "b"]}, entries)[0]
    assert whole[1] != checksums({"values": frames, **others, "kind": torch.tensor([1, 3])}, entries)[1]


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.float64])
def test_checksums_of_any_type(dtype):
    values = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1]], dtype=dtype)
    entries = rule(values=PaddedEntry(0, 0))
    assert checksums({"values": values}, entries)[0] == checksums({"values": values[:1, :2]}, entries)[0]


def test_rule_survives_its_way_into_a_store():
    one = rule("left", (80, 9), values=PaddedEntry(1, -1.5), kind=None)
    assert PaddingRule.from_json(one.constants[WIDEST]) == one
    assert one.of(frozenset({"values"})).entries.keys() == {"values"}


def test_other_samples_are_named_with_a_reason():
    split = split_padded(batch(SAMPLES, 9), rule())
    stored = {**split.columns, **split.constants}
    assert stored.keys() == {CHECKSUM, WIDEST}
    assert why_other_samples(stored, batch(SAMPLES, 6)) is None
    assert "2 samples" in why_other_samples(stored, batch(SAMPLES[:1], 6))
    assert "others than when" in why_other_samples(stored, batch(SAMPLES[::-1], 6))
    assert "none had more than (9,)" in why_other_samples(stored, batch(SAMPLES, 10))
    assert "does not return 'mask'" in why_other_samples(stored, {"values": batch(SAMPLES, 6)["values"]})
    with pytest.raises(RowError, match="'values'"):
        split_padded([1, 2], rule())
