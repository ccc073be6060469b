"""Plans of real models on real loaders: bytes to the byte, and nothing touched."""

from dataclasses import replace

import pytest
import torch
from support import helpers, images
from support.helpers import make_args, pixel_dataset, tiny_vit
from support.packed_stores import DATA, stores_of, train_on_rows
from support.trainer_data import image_dataset, to_pixels
from support.untouched import assert_same, snapshot, with_gradients
from torchvision.transforms import v2
from transformers import BertConfig, BertForSequenceClassification

from hf_freezecache import FreezeCacheConfig, plan
from hf_freezecache.model.chain import ChainError


@pytest.fixture
def pictures():
    return images.picture_dataset(40).with_transform(images.replayable())


@pytest.mark.parametrize("model", ["resnet", "vit"])
def test_plan_leaves_model_generators_and_disk_alone(model, pictures, tmp_path):
    network = helpers.tiny_resnet() if model == "resnet" else helpers.tiny_vit()
    with_gradients(network)
    torch.manual_seed(5)
    before = snapshot(network)
    args = helpers.make_args(tmp_path / "output", remove_unused_columns=False)
    config = FreezeCacheConfig(feature_cache_dir=str(tmp_path / "stores"))
    found = plan(network, pictures, config, args=args, batches=2)
    assert_same(before, snapshot(network))
    assert list(tmp_path.iterdir()) == []
    assert [row.cut for row in found.rows] == list(range(1, len(found.rows) + 1))


def test_plan_has_a_row_a_cut_with_everything_in_it(tmp_path):
    model = helpers.tiny_vit()
    args = helpers.make_args(tmp_path)
    found = plan(model, helpers.pixel_dataset(24), args=args, batches=1)
    assert [(row.cut, row.block, row.codec) for row in found.rows] == [
        (1, "vit.embeddings", "int4"),
        (2, "vit.layers.0", "int4"),
        (3, "vit.layers.1", "int4"),
        (4, "vit.layers.2", "int4"),
    ]
    for row in found.rows:
        assert min(row.build_seconds, row.live_step_seconds, row.replay_step_seconds) > 0
        assert row.live_epoch_seconds == pytest.approx(3 * row.live_step_seconds)
        assert row.view_bytes == 0 and row.fits
    memory = [row.peak_memory_bytes for row in found.rows]
    assert memory == sorted(memory, reverse=True) and memory[0] > memory[-1]
    parameters = sum(p.numel() * 4 for p in model.parameters())
    assert memory[-1] >= parameters
    assert found.live_epoch_seconds == pytest.approx(3 * found.live_step_seconds) and found.live_step_seconds > 0
    assert "1 batch of 8 of 24 samples" in str(found) and found.probed in str(found)
    assert [row.cut for row in plan(model, helpers.pixel_dataset(24), args=args, cuts=[3, 1], batches=1).rows] == [
        3,
        1,
    ]


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, "replayed"),
        ({"views": 2, "sensitive_fraction": 1.0}, "whole"),
        ({"views": 2, "codec": "fp16"}, "replayed"),
        ({"views": 0}, "none"),
    ],
)
def test_bytes_are_those_of_the_store_that_is_then_built(settings, kind, pictures, tmp_path):
    args = helpers.make_args(tmp_path, remove_unused_columns=False, num_train_epochs=1)
    found = plan(helpers.tiny_vit(), pictures, FreezeCacheConfig(**settings), args=args, cuts=[2], batches=2)
    trainer = helpers.run(
        helpers.tiny_vit(),
        pictures,
        tmp_path,
        helpers.manual("0:2", cache="always", **settings),
        num_train_epochs=1,
        remove_unused_columns=False,
    )
    (row,) = found.rows
    assert row.bytes == trainer.freeze_status().store_bytes
    assert (row.view_bytes > 0) == (kind != "none")


@pytest.mark.parametrize("replayed", [True, False])
def test_opaque_augmentation_is_planned_as_whole_views(replayed, tmp_path):
    transform = images.replayable() if replayed else images.OpaqueFlip()
    dataset = images.picture_dataset(24).with_transform(transform)
    args = helpers.make_args(tmp_path, remove_unused_columns=False)
    (row,) = plan(helpers.tiny_vit(), dataset, args=args, cuts=[2], batches=1).rows
    whole = row.view_bytes > 0.9 * row.base_bytes
    assert whole != replayed


def test_geometry_that_is_no_homography_is_planned_as_it_would_be_kept(tmp_path):
    elastic = v2.Compose([v2.ElasticTransform(alpha=120.0, sigma=3.0), *images.TO_PIXELS])
    dataset = images.picture_dataset(16).with_transform(images.replayable(elastic))
    args = helpers.make_args(tmp_path, remove_unused_columns=False, num_train_epochs=1)
    (row,) = plan(helpers.tiny_vit(), dataset, args=args, cuts=[2], batches=2).rows
    trainer = helpers.run(
        helpers.tiny_vit(),
        dataset,
        tmp_path,
        helpers.manual("0:2", cache="always"),
        num_train_epochs=1,
        remove_unused_columns=False,
    )
    assert trainer.freeze_status().store_bytes == row.bytes


def test_text_model_is_planned_with_named_blocks(tmp_path):
    torch.manual_seed(0)
    settings = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = BertForSequenceClassification(BertConfig(**settings, num_labels=5))
    rows = [
        {"input_ids": torch.arange(1, 8) + row, "attention_mask": torch.ones(7, dtype=torch.int64), "labels": row % 5}
        for row in range(20)
    ]
    blocks = ["bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1"]
    found = plan(model, rows, FreezeCacheConfig(blocks=blocks), args=helpers.make_args(tmp_path), batches=1)
    assert [row.block for row in found.rows] == blocks
    assert len({row.bytes for row in found.rows}) == 1


def test_mixed_precision_is_that_of_the_training(tmp_path):
    args = helpers.make_args(tmp_path, bf16=True)
    config = FreezeCacheConfig(codec="fp32")
    network, dataset = helpers.tiny_resnet(), helpers.pixel_dataset(16, size=32)
    (half,) = plan(network, dataset, config, args=args, cuts=[3], batches=1).rows
    (full,) = plan(network, dataset, config, args=helpers.make_args(tmp_path), cuts=[3], batches=1).rows
    trainer = helpers.run(
        network, dataset, tmp_path, helpers.manual("0:3", cache="always", codec="fp32"), num_train_epochs=1, bf16=True
    )
    assert half.bytes == trainer.freeze_status().store_bytes
    assert half.bytes < full.bytes or trainer.model.dtype == torch.float32


def test_columns_that_no_model_takes_are_removed_as_the_trainer_does(tmp_path):
    dataset = helpers.pixel_dataset(16)
    dataset = dataset.add_column("weight", [1.5] * 16)
    args = helpers.make_args(tmp_path, num_train_epochs=1)
    (row,) = plan(helpers.tiny_vit(), dataset, args=args, cuts=[1], batches=1).rows
    trainer = helpers.run(
        helpers.tiny_vit(), dataset, tmp_path, helpers.manual("0:1", cache="always"), num_train_epochs=1
    )
    assert row.bytes == trainer.freeze_status().store_bytes


def test_budget_says_what_does_not_fit(tmp_path):
    args, dataset = helpers.make_args(tmp_path), helpers.pixel_dataset(16)
    (free,) = plan(helpers.tiny_vit(), dataset, args=args, cuts=[1], batches=1).rows
    for budget, fits in ((free.bytes, True), (free.bytes - 1, False)):
        config = FreezeCacheConfig(cache_budget=str(budget))
        (row,) = plan(helpers.tiny_vit(), dataset, config, args=args, cuts=[1], batches=1).rows
        assert row.fits == fits and row.verdict.startswith("does not fit") != fits


class OneLayer(torch.nn.Linear):
    def __init__(self):
        super().__init__(8, 3)

    def forward(self, x, labels=None):
        return {"loss": None, "logits": super().forward(x)}


def test_bad_input_is_named(tmp_path):
    args = helpers.make_args(tmp_path)
    model, dataset = helpers.tiny_vit(), helpers.pixel_dataset(16)
    with pytest.raises(ValueError, match="is iterable"):
        plan(model, dataset.to_iterable_dataset(), args=args)
    for cut in (0, 5, True, 1.0):
        with pytest.raises(ValueError, match="4 blocks .*from 1 to 4"):
            plan(model, dataset, args=args, cuts=[cut])
    with pytest.raises(ValueError, match="cuts is empty"):
        plan(model, dataset, args=args, cuts=[])
    with pytest.raises(ValueError, match="batches=0"):
        plan(model, dataset, args=args, batches=0)
    with pytest.raises(ChainError, match="cannot be cut anywhere"):
        plan(OneLayer(), [{"x": torch.zeros(8), "labels": 0}] * 2, args=args)


# Packed rows


@pytest.mark.parametrize(("data", "codec"), [("plain", "fp32"), ("sensitive", "int4"), ("whole", "int8")])
def test_plan_predicts_the_packed_bytes(data, codec, tmp_path):
    dataset = DATA[data]()
    args = make_args(tmp_path, remove_unused_columns=False)
    config = FreezeCacheConfig(lossless=True, codec=codec)
    found = plan(tiny_vit(), dataset, config, args=args, cuts=[2], batches=2)
    [row] = found.rows
    store = stores_of(train_on_rows(tmp_path, True, dataset, codec=codec))[2]
    assert row.bytes == pytest.approx(store.bytes, rel=0.03)
    assert row.bytes < row.needed == row.most_bytes and store.bytes <= row.most_bytes
    assert "Rows are packed" in str(found)
    plain = plan(tiny_vit(), dataset, replace(config, lossless=False), args=args, cuts=[2], batches=2)
    assert plain.rows[0].most_bytes is None and plain.rows[0].needed == plain.rows[0].bytes
    assert "packed" not in str(plain)


def test_plan_says_that_rows_might_not_fit_before_they_are_packed(tmp_path):
    dataset, args = pixel_dataset(), make_args(tmp_path)
    [row] = plan(tiny_vit(), dataset, FreezeCacheConfig(lossless=True), args=args, cuts=[2], batches=1).rows
    most = replace(row, limit=row.most_bytes)
    assert most.fits and not replace(row, limit=row.most_bytes - 1).fits
    assert "does not fit" in replace(row, limit=row.bytes).verdict


def test_plan_without_arguments_keeps_the_columns_that_a_transform_reads():
    dataset = image_dataset(16).with_transform(to_pixels)
    found = plan(tiny_vit(), dataset, cuts=[2], batches=1)
    assert [row.cut for row in found.rows] == [2]


def test_column_that_a_transform_misses_is_explained(tmp_path):
    dataset = image_dataset(16).with_transform(to_pixels)
    with pytest.raises(ValueError, match="reads the column 'image'.*remove_unused_columns=False"):
        plan(tiny_vit(), dataset, args=make_args(tmp_path), cuts=[2])
