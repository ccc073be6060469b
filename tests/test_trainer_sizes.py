"""Images of several sizes, of which each batch has one: stored in their own sizes."""

import pytest
import timm
import torch
from support.helpers import (
    CLASSES,
    assert_same_weights,
    losses,
    make_args,
    manual,
    messages,
    tiny_resnet,
    tiny_vit,
    weights,
)
from support.pretrained import settle
from support.sized_images import GroupingTrainer, SizedImages, interpolating, train_sized
from support.sounds import Sounds, wav2vec2
from transformers import ConvNextConfig, ConvNextForImageClassification, TrainerCallback, default_data_collator

from hf_freezecache import FeatureStore, FreezeCacheConfig, FreezeCacheTrainer, plan, wrap_classifier
from hf_freezecache.cache.names import CHECKSUM, TOKENS


def convnext():
    torch.manual_seed(0)
    sizes = dict(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, num_labels=CLASSES)
    return ConvNextForImageClassification(ConvNextConfig(**sizes))


def timm_convnext():
    torch.manual_seed(0)
    return wrap_classifier(timm.create_model("test_convnext", num_classes=CLASSES))


def cached(points="1:3", **settings):
    return manual(points, codec="fp32", on_mismatch="error", **settings)


def frozen(points="1:3"):
    return manual(points, cache="never")


def store_of(folder) -> FeatureStore:
    (path,) = [path.parent for path in folder.rglob("manifest.json")]
    return FeatureStore.open(path)


class CountLive(TrainerCallback):
    """Counts how often the stem runs in steps of the last epoch."""

    def __init__(self):
        self.runs, self.is_counting = 0, False

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.epoch >= args.num_train_epochs - 1 and not self.is_counting:
            self.is_counting = True
            stem = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
            stem.register_forward_hook(self.count)

    def count(self, *args):
        self.runs += 1


MODELS = [
    (tiny_resnet, default_data_collator, "1:2"),
    (tiny_resnet, default_data_collator, "1:5"),
    (convnext, default_data_collator, "1:3"),
    (timm_convnext, default_data_collator, "1:3"),
    (tiny_vit, interpolating, "1:1"),
    (tiny_vit, interpolating, "1:3"),
]


@pytest.mark.parametrize(("make", "collator", "points"), MODELS)
def test_batches_of_one_image_of_any_size_are_cached(make, collator, points, tmp_path):
    settings = dict(data_collator=collator, per_device_train_batch_size=1, trainer_class=FreezeCacheTrainer)
    live = CountLive()
    expected = train_sized(make, SizedImages(12), tmp_path / "frozen", frozen(points), **settings)
    found = train_sized(make, SizedImages(12), tmp_path / "cached", cached(points), callbacks=[live], **settings)
    assert found.freeze_status().replaying and live.runs == 0
    assert losses(found) == losses(expected)
    assert_same_weights(weights(found), weights(expected))
    assert store_of(tmp_path / "cached").manifest.inputs.keys() == {TOKENS, CHECKSUM}


@pytest.mark.parametrize(("make", "collator", "points"), MODELS)
def test_batches_of_one_size_each_are_cached(make, collator, points, tmp_path):
    """A build runs other groups than the training: kernels for other batches may round otherwise."""
    live = CountLive()
    expected = train_sized(make, SizedImages(), tmp_path / "frozen", frozen(points), data_collator=collator)
    settings = dict(data_collator=collator, callbacks=[live])
    found = train_sized(make, SizedImages(), tmp_path / "cached", cached(points), **settings)
    assert found.freeze_status().replaying and live.runs == 0
    assert losses(found) == pytest.approx(losses(expected), abs=2e-4)


@pytest.mark.parametrize(("make", "collator", "points"), MODELS)
def test_training_is_the_frozen_one_bit_for_bit_where_a_build_has_its_batches(make, collator, points, tmp_path):
    settings = dict(data_collator=collator, trainer_class=FreezeCacheTrainer, train_sampling_strategy="sequential")
    images = SizedImages(in_a_row=4)
    expected = train_sized(make, images, tmp_path / "frozen", frozen(points), **settings)
    found = train_sized(make, images, tmp_path / "cached", cached(points), **settings)
    assert found.freeze_status().replaying
    assert losses(found) == losses(expected)
    assert_same_weights(weights(found), weights(expected))
