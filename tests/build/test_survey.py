"""What of the samples is random, and which channels follow it."""

import pytest
import torch
from safetensors.torch import load_file
from support.builds import Rows, collate
from support.helpers import pixel_dataset, tiny_vit
from support.images import TO_PIXELS, OpaqueFlip, picture_dataset, replayable
from support.noisy_rows import DRAWS, Noisy, source
from support.token_rows import Pad, Texts
from support.view_trainings import train
from torch.utils.data import ConcatDataset
from torchvision.transforms import v2
from transformers import default_data_collator

from hf_freezecache.build.padded_samples import collator_pads
from hf_freezecache.build.survey import (
    Augmentation,
    look_closer,
    ranges_drawn,
    survey,
    why_random_on_device,
)
from hf_freezecache.cache.rows import RowSource
from hf_freezecache.model.inputs import ModelInputs
from hf_freezecache.model.tokens import TextInputs


def test_deterministic_samples_are_not_random():
    assert not survey(source(), "pixel_values").random
    assert not survey(source(pixel_dataset(8), collator=default_data_collator), "pixel_values").random


@DRAWS
def test_random_transform_is_found(draw):
    assert survey(source(Noisy(draw)), "pixel_values").random


@DRAWS
def test_random_collator_is_found(draw):
    def noisy(samples):
        batch = collate(samples)
        return {**batch, "pixel_values": batch["pixel_values"] + draw()}

    assert survey(source(collator=noisy), "pixel_values").random


def test_random_label_alone_is_found():
    """MixUp in a collator changes labels too; a label may be the only random entry."""

    def noisy(samples):
        return {**collate(samples), "mask": torch.rand(len(samples))}

    assert survey(source(collator=noisy), "pixel_values").random


def test_rare_randomness_is_found():
    def flip_all_or_nothing(rows):
        pixels = torch.tensor([[float(row), 0.0] for row in rows])
        return {"pixel_values": pixels.flip(1) if torch.rand(()) < 0.5 else pixels}

    found = [survey(RowSource(range(8), flip_all_or_nothing, 4, seed), "pixel_values").random for seed in range(50)]
    assert sum(found) >= 48
    assert not survey(
        RowSource(range(8), lambda rows: {"pixel_values": torch.tensor(rows)}, 4, 0), "pixel_values"
    ).random


def test_survey_tells_replayable_from_opaque():
    def look(transform, collator=collate):
        return survey(RowSource(picture_dataset().with_transform(transform), collator, 4, 0), "pixel_values")

    def noisy(samples):
        batch = collate(samples)
        return {**batch, "pixel_values": batch["pixel_values"] + torch.randn(1)}

    assert not survey(RowSource(Rows(), collate, 4, 0), "pixel_values").random
    assert not look(replayable(v2.Compose(TO_PIXELS))).random
    with pytest.raises(ValueError, match="nothing at random and differs"):
        look(replayable(v2.Compose([v2.RandomHorizontalFlip(p=1.0), *TO_PIXELS])))
    with pytest.raises(ValueError, match="the same size"):
        look(replayable(v2.Compose([v2.RandomCrop(8), *TO_PIXELS])))
    found = look(replayable())
    assert found.random and found.replayable
    opaque = look(OpaqueFlip())
    assert opaque.random and not opaque.replayable and "ReplayableTransform" in opaque.why_not and opaque.own_inputs
    refusing = look(replayable(v2.Compose([v2.RandAugment(), *TO_PIXELS])))
    assert refusing.random and not refusing.replayable and not refusing.own_inputs
    both = look(replayable(), noisy)
    assert both.random and not both.replayable and "collator" in both.why_not and both.own_inputs


# Which channels


def test_least_similar_channels_are_kept(tmp_path):
    _, store = train(picture_dataset().with_transform(replayable()), tmp_path)
    similarity = load_file(store.path / "sensitivity.safetensors")["similarity"]
    kept = store.manifest.sensitive_channels
    others = [channel for channel in range(32) if channel not in kept]
    assert similarity[kept].max() <= similarity[others].min()


def test_budget_decides_the_number_of_channels(tmp_path):
    dataset = picture_dataset().with_transform(replayable())
    for budget, expected in (("4KB", 15), ("4097", 16), ("1MB", None), ("0", 0)):
        _, store = train(dataset, tmp_path / budget, sensitive_budget=budget)
        kept = store.manifest.sensitive_channels
        if expected is None:
            assert kept is None and store.manifest.views == 1
            continue
        # 32 samples, 8 bytes a channel.
        assert len(kept) == expected


# All over the data set


class Part(Rows):
    """Rows with noise in some of them."""

    def __init__(self, rows, is_noisy):
        super().__init__(rows)
        self.is_noisy = is_noisy
        self.targets = [row * 4 // rows for row in range(rows)]

    def __getitem__(self, row):
        sample = super().__getitem__(row)
        noise = torch.randn(()) if self.is_noisy(row) else 0.0
        return {**sample, "pixel_values": sample["pixel_values"] + noise}


def never(row):
    return False


def test_randomness_in_one_part_is_found():
    def look(*parts):
        return survey(RowSource(ConcatDataset(parts), collate, 4, 0), "pixel_values").random

    plain, noisy = Part(200, never), Part(200, lambda row: True)
    assert look(plain, noisy) and look(noisy, plain) and look(plain, plain, noisy, plain)
    assert not look(plain, plain)


def test_randomness_in_one_class_is_found():
    for label in range(4):
        dataset = Part(1000, lambda row, label=label: row * 4 // 1000 == label and row % 250 > 100)
        dataset.targets = [row // 250 if row % 250 > 100 else 9 for row in range(1000)]
        assert survey(RowSource(dataset, collate, 4, 0), "pixel_values").random


def test_rare_randomness_is_found_by_a_closer_look():
    rare = Part(3000, lambda row: row % 100 == 17)
    source = RowSource(rare, collate, 100, 0)
    assert look_closer(source).random and not look_closer(source).replayable
    assert look_closer(RowSource(Part(3000, never), collate, 100, 0)) is None


def test_missing_labels_are_not_random():
    def missing(samples):
        batch = collate(samples)
        return {**batch, "labels": torch.full((len(samples),), torch.nan)}

    assert not survey(RowSource(Rows(64), missing, 4, 0), "pixel_values").random


def test_collator_whose_rows_are_no_samples_is_declined():
    def standardize(samples):
        batch = collate(samples)
        return {**batch, "pixel_values": batch["pixel_values"] / batch["pixel_values"].std()}

    assert "rest of the batch" in survey(RowSource(Rows(64), standardize, 8, 0), "pixel_values").declined


def test_survey_reads_tens_of_rows():
    class Counting(Rows):
        seen, reads = set(), 0

        def __getitem__(self, row):
            Counting.reads += 1
            self.seen.add(row)
            return super().__getitem__(row)

    survey(RowSource(Counting(5000), collate, 32, 0), "pixel_values")
    assert len(Counting.seen) <= 24 and Counting.reads <= 200


def test_samples_of_several_sizes_are_looked_at_by_their_size():
    class Sizes(Part):
        def __getitem__(self, row):
            pixels = super().__getitem__(row)["pixel_values"]
            return {"pixel_values": pixels[..., : 8 if row < 32 else 16], "labels": row}

    def look(is_noisy, collator=collate):
        texts = TextInputs("pixel_values", frozenset({"pixel_values"}))
        return survey(RowSource(Sizes(64, is_noisy), collator, 8, 0, texts=texts), "pixel_values")

    assert look(never) == Augmentation(padded=True)
    assert "drawn at random" in look(lambda row: row > 55).declined
    assert "rest of the batch" in look(never, lambda samples: collate(samples[::-1])).declined


# On the device


@pytest.mark.parametrize("in_place", [False, True])
def test_randomness_on_the_device_is_found(in_place):
    def prepare(inputs):
        if model.training:
            noise = torch.randn(len(inputs["pixel_values"]), 1, 1, 1)
            if in_place:
                inputs["pixel_values"] += noise
            else:
                inputs = {**inputs, "pixel_values": inputs["pixel_values"] + noise}
        return inputs

    model = tiny_vit().eval()
    batch = collate([Rows()[0], Rows()[1]])
    before = {name: value.clone() for name, value in batch.items()}
    assert "on the device" in why_random_on_device(ModelInputs(model, prepare, ["labels"]), batch)
    assert why_random_on_device(ModelInputs(model, dict, ["labels"]), batch) is None
    assert all(torch.equal(batch[name], before[name]) for name in batch)
    assert not any(module.training for module in model.modules())


def test_number_of_ranges_to_look_at_is_what_is_drawn():
    class Counted(Rows):
        drawn = 0

        def __getitem__(self, row):
            Counted.drawn += 1
            return super().__getitem__(row)

    source = RowSource(Counted(600), collate, batch_size=8, seed=0)
    survey(source, "pixel_values")
    assert ranges_drawn(source, closer=False) == pytest.approx(Counted.drawn / 8, rel=0.1)
    Counted.drawn = 0
    look_closer(source)
    assert ranges_drawn(source, closer=True) == Counted.drawn / 8


class Grows(Rows):
    """Images of two sizes, each in a half of its own."""

    def __getitem__(self, row):
        sample = super().__getitem__(row)
        return (
            sample if row < 32 else {**sample, "pixel_values": torch.nn.functional.pad(sample["pixel_values"], (0, 4))}
        )


def test_samples_that_cannot_be_collated_together_are_looked_at_range_by_range(caplog):
    caplog.set_level("DEBUG", logger="hf_freezecache")
    survey(source(Grows(64)), "pixel_values")
    told = [record for record in caplog.records if "cannot be collated together" in record.getMessage()]
    assert [record.levelname for record in told[:2]] == ["INFO", "DEBUG"]
    assert "Error)" in told[0].getMessage() and told[1].exc_info is not None


def test_a_collator_that_fails_on_a_single_text_is_survived_with_its_error(caplog):
    caplog.set_level("INFO")

    def pad(samples):
        if len(samples) == 1:
            raise KeyError("two at least")
        return Pad()(samples)

    assert collator_pads(RowSource(Texts(32), Pad(), 8, 0), "input_ids")
    assert not collator_pads(RowSource(Texts(32), pad, 8, 0), "input_ids")
    assert "'two at least' (KeyError)" in caplog.text
