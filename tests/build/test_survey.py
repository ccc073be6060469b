"""What of the samples is random, and which channels follow it."""

import pytest
import torch
from safetensors.torch import load_file
from support.builds import Rows, collate
from support.helpers import pixel_dataset
from support.images import TO_PIXELS, OpaqueFlip, picture_dataset, replayable
from support.noisy_rows import DRAWS, Noisy, source
from support.view_trainings import train
from torchvision.transforms import v2
from transformers import default_data_collator

from hf_freezecache.build.survey import survey
from hf_freezecache.cache.rows import RowSource


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
