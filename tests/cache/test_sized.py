"""What is known of samples of several sizes: collated with those of their size, and told apart by a checksum."""

import pytest
import torch
from support.sized_images import SIZES, SizedImages
from transformers import default_data_collator

from hf_freezecache.cache.names import CHECKSUM, TOKENS
from hf_freezecache.cache.names import SIZES as SIZES_NAME
from hf_freezecache.cache.rows import RowError
from hf_freezecache.cache.sized import BySize, SizedBatch, SizeRule, checksums, split_sized, why_other_sizes

RULE = SizeRule("pixel_values", frozenset({"pixel_values"}))


def collated(images, most=4, collator=default_data_collator) -> SizedBatch:
    return BySize(collator, "pixel_values", most)([images[row] for row in range(len(images))])


def test_samples_of_equal_size_are_collated_together():
    images = SizedImages(10)
    batch = collated(images)
    assert len(batch) == 10 and [list(places) for places, _ in batch.parts] == [[0, 4, 8], [1, 5, 9], [2, 6], [3, 7]]
    for (places, part), size in zip(batch.parts, SIZES, strict=True):
        assert torch.equal(part["pixel_values"], torch.stack([images.images[place] for place in places]))
        assert part["pixel_values"].shape[2:] == size


def test_no_more_samples_are_collated_together_than_a_batch_has():
    assert [list(places) for places, _ in collated(SizedImages(5, SIZES[:1]), most=2).parts] == [[0, 1], [2, 3], [4]]


def test_samples_are_not_changed_by_the_first_look_at_them():
    """Collators take entries out of samples."""

    def take(samples):
        return {"pixel_values": torch.stack([sample.pop("pixel_values") for sample in samples])}

    assert len(collated(SizedImages(10), collator=take)) == 10


def test_rows_do_not_depend_on_those_beside_them():
    whole, alone = (split_sized(collated(SizedImages(10), most), RULE) for most in (4, 1))
    assert torch.equal(whole.columns[CHECKSUM], alone.columns[CHECKSUM]) and torch.equal(whole.main, alone.main)
    assert whole.main.tolist() == [[3, *SIZES[row % 4]] for row in range(10)]
    assert whole.columns.keys() == {TOKENS, CHECKSUM} and len(set(whole.columns[CHECKSUM].tolist())) == 10


def test_the_rule_survives_a_store():
    rule = SizeRule("a", frozenset({"a", "b"}))
    assert SizeRule.from_json(rule.constants[SIZES_NAME]) == rule
    assert rule.of(frozenset({"a"})).read == {"a"}


@pytest.mark.parametrize(
    "change",
    [
        lambda pixels: pixels.transpose(2, 3),
        lambda pixels: pixels.reshape(*pixels.shape[:2], pixels.shape[3], pixels.shape[2]),  # the same bytes
        lambda pixels: pixels + 1e-3,
        lambda pixels: pixels[:, :, :-1],
        lambda pixels: pixels.flip(0),
    ],
    ids=["turned", "another shape", "other numbers", "smaller", "order"],
)
def test_other_samples_and_sizes_are_seen(change):
    batch = default_data_collator([SizedImages(8, SIZES[1:2])[row] for row in range(4)])
    codes = {CHECKSUM: checksums(batch, RULE), **RULE.constants}
    assert why_other_sizes(codes, batch) is None
    assert "are others" in why_other_sizes(codes, {**batch, "pixel_values": change(batch["pixel_values"])})


def test_batches_that_are_not_those_of_the_samples_are_refused_in_words():
    batch = default_data_collator([SizedImages(4, SIZES[:1])[row] for row in range(4)])
    codes = {CHECKSUM: checksums(batch, RULE)[:3], **RULE.constants}
    assert "returned 4 rows for 3 samples" in why_other_sizes(codes, batch)
    assert "no tensor 'pixel_values'" in why_other_sizes(codes, {"labels": batch["labels"]})
    with pytest.raises(RowError, match="the frozen blocks read 'mask'"):
        checksums(batch, SizeRule("pixel_values", frozenset({"pixel_values", "mask"})))
    with pytest.raises(RowError, match="batches, not samples"):
        BySize(default_data_collator, "pixel_values", 4)({"pixel_values": batch["pixel_values"]})
    twice = SizedBatch([((0, 1), batch)])
    with pytest.raises(RowError, match="4 rows for 2 samples"):
        split_sized(twice, RULE)
