"""Collators whose rows are samples, and those whose rows depend on the batch."""

import pytest
import torch
from support.builds import Rows, collate
from torch.utils.data import Dataset
from transformers import default_data_collator

from hf_freezecache.build.company import why_not_by_row
from hf_freezecache.build.spread_rows import spread_rows
from hf_freezecache.cache.rows import RowError, RowSource


def reason(collator, dataset=None, batch_size=8):
    source = RowSource(Rows(64) if dataset is None else dataset, collator, batch_size, seed=0)
    return why_not_by_row(source, spread_rows(source.dataset, 24, 0), "pixel_values")


def changed(change):
    """A collator that changes the pixels of the batch."""

    def collator(samples):
        batch = collate(samples)
        return {**batch, "pixel_values": change(batch["pixel_values"])}

    return collator


def popping(samples):
    """Takes entries out of the samples, as some collators do."""
    labels = [sample.pop("labels") for sample in samples]
    return {**collate(samples), "labels": torch.tensor(labels)}


def missing(samples):
    """With labels of which some are NaN."""
    batch = collate(samples)
    return {**batch, "labels": torch.where(batch["labels"] == 2, torch.nan, batch["labels"].float())}


def refuse_odd(samples):
    assert len(samples) % 2 == 0, "an even batch"
    return collate(samples)


def refuse_one(samples):
    assert len(samples) > 1
    return collate(samples)


@pytest.mark.parametrize(
    "collator",
    [
        collate,
        default_data_collator,
        popping,
        missing,
        refuse_odd,
        refuse_one,
        changed(lambda pixels: (pixels - 0.3) / 0.7),
        changed(lambda pixels: torch.nn.functional.interpolate(pixels, size=8, mode="bilinear")),
        changed(lambda pixels: pixels + torch.randn(len(pixels), 1, 1, 1)),
        changed(lambda pixels: pixels.flip(3) if torch.rand(()) < 0.5 else pixels),
        lambda samples: {**collate(samples), "name": [f"{sample['labels']}" for sample in samples], "scale": 2.0},
    ],
)
def test_rows_are_samples(collator):
    assert reason(collator) is None
    assert reason(collator, Rows(6)) is None


def mix(pixels):
    weight = torch.distributions.Beta(0.8, 0.8).sample()
    return weight * pixels + (1 - weight) * pixels.flip(0)


def shuffle(samples):
    return collate([samples[place] for place in torch.randperm(len(samples)).tolist()])


@pytest.mark.parametrize(
    ("collator", "why"),
    [
        (changed(lambda pixels: (pixels - pixels.mean()) / pixels.std()), "depend on the rest of the batch"),
        (changed(lambda pixels: (pixels + pixels.flip(0)) / 2), "depend on the rest of the batch"),
        (changed(mix), "depend on the rest of the batch"),
        (changed(lambda pixels: mix(pixels) if torch.rand(()) < 0.5 else pixels), "depend on the rest of the batch"),
        (lambda samples: collate(sorted(samples, key=lambda sample: float(sample["pixel_values"].mean()))), "sorts"),
        (shuffle, "rest of the batch"),
        (lambda samples: collate([s for s in samples if s["labels"] != 3] or samples), "drops or adds"),
        (lambda samples: {**collate(samples), "rank": torch.arange(len(samples))}, "'rank' of a sample changes"),
        (lambda samples: {**collate(samples), "size": len(samples)}, "besides one value per sample"),
        (lambda samples: {**collate(samples), "one" if len(samples) % 2 else "two": 1}, "besides|other entries"),
        (
            lambda samples: {**collate(samples), "mask": torch.ones(len(samples), max(s["labels"] for s in samples))},
            "the size of a row of 'mask' depends",
        ),
    ],
)
def test_reason_is_named(collator, why):
    found = reason(collator)
    assert found is not None and any(part in found for part in why.split("|")), found


def test_collator_that_refuses_the_last_range_is_told(caplog):
    caplog.set_level("DEBUG", logger="hf_freezecache")
    assert "fails for the last 3 samples" in reason(refuse_odd, Rows(67))
    assert reason(refuse_odd, Rows(66)) is None
    assert "fails for the last 1 samples" in reason(refuse_one, Rows(65))
    traced = [record for record in caplog.records if record.getMessage() == "The collator fails for the last samples"]
    assert traced and all(record.exc_info for record in traced)


def test_only_the_collator_itself_may_refuse_a_batch_of_another_size(caplog):
    caplog.set_level("INFO", logger="hf_freezecache")
    assert reason(refuse_odd) is None and "The collator fails for 5 samples: an even batch" in caplog.text
    with pytest.raises(RowError, match="'rest' is neither one value per sample"):
        reason(lambda samples: {**collate(samples), **({"rest": [{}]} if len(samples) % 2 else {})})
    with pytest.raises(AssertionError, match="an even batch"):
        reason(refuse_odd, Rows(7))


def test_batches_of_one_sample_have_no_company():
    def squeeze(samples):
        [sample] = samples
        return collate([sample])

    assert reason(squeeze, batch_size=1) is None


def test_unreadable_rows_that_a_collator_drops_are_found():
    class Holes(Rows):
        def __getitem__(self, row):
            return None if row == 0 else super().__getitem__(row)

    found = reason(lambda samples: collate([sample for sample in samples if sample is not None]), Holes(64))
    assert "returns 7 rows for 8 samples" in found


class Batches(Dataset):
    """Fetches batches, not samples."""

    def __init__(self, standardizes):
        self.rows, self.standardizes = Rows(64), standardizes

    def __len__(self):
        return 64

    def __getitem__(self, row):
        return self.rows[row]

    def __getitems__(self, rows):
        batch = collate([self.rows[row] for row in rows])
        mean = batch["pixel_values"].mean() if self.standardizes else 0.5
        return {**batch, "pixel_values": batch["pixel_values"] - mean}


def test_data_set_that_makes_the_batches_is_asked_again():
    assert reason(lambda batch: batch, Batches(standardizes=False)) is None
    assert "depend on the rest of the batch" in reason(lambda batch: batch, Batches(standardizes=True))


def test_random_transforms_do_not_hide_a_collators_dependence():
    class Noisy(Rows):
        def __getitem__(self, row):
            sample = super().__getitem__(row)
            return {**sample, "pixel_values": sample["pixel_values"] + torch.randn(())}

    assert reason(collate, Noisy(64)) is None
    assert "rest of the batch" in reason(changed(lambda pixels: pixels - pixels.mean()), Noisy(64))


def test_generators_are_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    reason(changed(mix))
    assert torch.equal(torch.get_rng_state(), before)
