"""timm's and torchvision's own pipelines and mixing, with models in the wrapper for them or in Transformers' own."""

from __future__ import annotations

import pytest
import timm.data
import timm.loss
import torch
import torchvision
from support.helpers import CLASSES, losses, manual, messages, run
from support.trainer_data import image_dataset
from support.zoo import timm_vit
from torch.utils.data import Dataset, default_collate
from torchvision.transforms import v2
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, Trainer

from hf_freezecache import ReplayableTransform, wrap_classifier

SIZE = 16
#: timm's transforms: that of evaluations, and that of trainings with random crops, flips, RandAugment and erasing.
WITHOUT_CHANCE = timm.data.create_transform(SIZE, is_training=False, crop_pct=1.0)
RANDOM = timm.data.create_transform(SIZE, is_training=True, auto_augment="rand-m9-mstd0.5", re_prob=0.25)


class Images(Dataset):
    """A plain data set that calls a transform on one image, as timm's and torchvision's do."""

    def __init__(self, transform):
        self.transform, self.rows = transform, image_dataset(16)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return {"pixel_values": self.transform(row["image"].convert("RGB")), "labels": row["label"]}


def transformed(transform):
    """A `datasets.Dataset` with the transform set on it."""

    def apply(batch):
        images = [transform(image.convert("RGB")) for image in batch["image"]]
        return {"pixel_values": images, "labels": batch["label"]}

    return image_dataset(16).with_transform(apply)


def of_timm():
    torch.manual_seed(0)
    return wrap_classifier(timm_vit(proj_drop_rate=0.1).train())


def of_torchvision():
    torch.manual_seed(0)
    return wrap_classifier(
        torchvision.models.VisionTransformer(SIZE, 4, 3, 2, 16, 32, dropout=0.1, num_classes=CLASSES)
    )


def of_transformers():
    torch.manual_seed(0)
    settings = {"img_size": SIZE, "patch_size": 4, "depth": 3}
    return TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture="test_vit", model_args=settings, num_labels=CLASSES)
    )


def train(make, data, folder, config=None, **settings):
    return run(make(), data, folder, config, num_train_epochs=3, remove_unused_columns=False, **settings)


models = pytest.mark.parametrize("make", [of_timm, of_torchvision, of_transformers])


@models
@pytest.mark.parametrize("data", [Images, transformed])
def test_timms_transform_of_evaluations_is_right(make, data, tmp_path):
    frozen = train(make, data(WITHOUT_CHANCE), tmp_path / "frozen", manual("1:2", cache="never"))
    cached = train(make, data(WITHOUT_CHANCE), tmp_path / "cached", manual("1:2", codec="fp32"))
    assert cached.freeze_status().replaying and len(cached.freeze_status().frozen_blocks) == 2
    assert losses(cached) == losses(frozen)
    assert all(torch.equal(a, b) for a, b in zip(cached.model.parameters(), frozen.model.parameters(), strict=True))


@models
@pytest.mark.parametrize("data", [Images, transformed])
def test_timms_random_transform_is_stored_in_whole_draws_and_said(make, data, tmp_path, caplog):
    frozen = train(make, data(RANDOM), tmp_path / "frozen", manual("1:2", cache="never"))
    cached = train(make, data(RANDOM), tmp_path / "cached", manual("1:2", codec="fp32", views=2))
    assert cached.freeze_status().replaying
    assert "the random transform is not a `ReplayableTransform`: 3 whole draws of every sample" in messages(caplog)
    # The live epoch draws as freezing alone does; then other draws are seen, no image without augmentation.
    assert losses(cached)[:2] == losses(frozen)[:2] and losses(cached)[2:] != losses(frozen)[2:]


def test_timms_transform_in_a_replayable_one_is_stored_whole_and_the_reason_is_said(tmp_path, caplog):
    """timm composes transforms of torchvision's first kind, which take no masks beside an image."""
    data = image_dataset(16).with_transform(ReplayableTransform(train=RANDOM, base=WITHOUT_CHANCE))
    cached = train(of_timm, data.rename_column("label", "labels"), tmp_path, manual("1:2"))
    assert cached.freeze_status().replaying
    assert "the train pipeline does not take an image with a mask" in messages(caplog)
    assert "2 whole draws of every sample are stored" in messages(caplog)


# Mixing


def mixing(mix):
    """A collator that mixes the batch, as timm's training script and torchvision's documentation do."""

    def collate(rows):
        batch = default_collate(rows)
        images, labels = mix(batch["pixel_values"], batch["labels"])
        return {"pixel_values": images, "labels": labels}

    return collate


MIXES = {
    "timm": timm.data.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, mode="batch", num_classes=CLASSES),
    "torchvision MixUp": v2.MixUp(num_classes=CLASSES),
    "torchvision CutMix": v2.CutMix(num_classes=CLASSES),
}


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("make", [of_timm, of_torchvision])
def test_collator_that_mixes_is_refused_a_cache_and_frozen_without_one(make, name, tmp_path, caplog):
    settings = {"data_collator": mixing(MIXES[name])}
    with pytest.raises(ValueError, match="changes with the samples beside it.*Use cache='auto' or 'never'"):
        train(make, transformed(WITHOUT_CHANCE), tmp_path / "always", manual("1:2"), **settings)
    ours = train(make, transformed(WITHOUT_CHANCE), tmp_path / "auto", manual("1:2", cache="auto"), **settings)
    plain = train(make, transformed(WITHOUT_CHANCE), tmp_path / "plain", trainer_class=Trainer, **settings)
    assert ours.freeze_status().cut == 2 and not ours.freeze_status().replaying
    if not name.startswith("timm"):  # which draws from NumPy's generator, one for all trainings
        assert losses(ours)[:2] == losses(plain)[:2]


@pytest.mark.parametrize("loss", [None, timm.loss.BinaryCrossEntropy(smoothing=0.0)], ids=["default", "of timm"])
def test_our_own_mixing_trains_a_wrapped_model_on_features_with_its_loss(loss, tmp_path):
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, logits, labels):
            seen.append(labels)
            return (loss or torch.nn.functional.cross_entropy)(logits, labels)

    def make():
        torch.manual_seed(0)
        return wrap_classifier(timm_vit().train(), loss=Spy())

    config = manual("1:2", mixup_alpha=0.8, cutmix_alpha=1.0)
    trainer = train(make, transformed(WITHOUT_CHANCE), tmp_path, config)
    assert trainer.freeze_status().replaying and trainer.compute_loss_func is None
    steps = [labels for labels in seen if len(labels) == 8]
    assert len(steps) >= 6 and all(labels.shape[1:] == (CLASSES,) for labels in steps)
    assert any(((labels > 0) & (labels < 1)).any() for labels in steps[-2:])  # of replay epochs


def test_our_own_mixing_of_a_model_without_a_number_of_classes_is_refused(tmp_path):
    class Bare(torch.nn.Module):
        def forward(self, pixel_values, labels=None):
            return {"loss": pixel_values.mean()}

    with pytest.raises(ValueError, match="needs `config.num_labels`, or, if it is of timm.*`wrap_classifier`"):
        run(Bare(), transformed(WITHOUT_CHANCE), tmp_path, manual("1:1", mixup_alpha=1.0))
