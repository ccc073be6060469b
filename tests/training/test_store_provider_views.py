"""Which views a training's store holds, and what the user is told about them."""

import logging

import numpy as np
import pytest
import torch
from support.helpers import manual, run, tiny_resnet, tiny_vit
from support.images import TO_PIXELS, OpaqueFlip, crop_and_flip, picture_dataset, replayable
from support.sessions import chain_of, rows_of
from support.trainer_data import MixedSizes, image_dataset, own_collator, to_pixels
from support.view_trainings import train
from torchvision.transforms import v2

from hf_freezecache import ReplayableTransform


@pytest.mark.parametrize(
    ("pipeline", "geometry"),
    [
        (crop_and_flip(), "projective"),
        (v2.Compose([v2.RandomRotation(30), *TO_PIXELS]), "projective"),
        (v2.Compose([v2.RandomCrop(16, padding=4, padding_mode="reflect"), *TO_PIXELS]), "dense"),
        (v2.Compose([*TO_PIXELS, v2.RandomErasing(p=1.0)]), "dense"),
        (v2.Compose([v2.RandAugment(), *TO_PIXELS]), None),
    ],
    ids=["crop and flip", "rotation", "reflecting crop", "erasing", "RandAugment"],
)
def test_geometry_is_kept_in_the_smallest_way_that_fits(pipeline, geometry, tmp_path):
    trainer, store = train(picture_dataset().with_transform(replayable(pipeline)), tmp_path)
    assert store.manifest.views == 1 and store.manifest.geometry == geometry
    assert (store.manifest.sensitive_channels is None) == (geometry is None)
    assert store.verify()
    assert np.isfinite([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]).all()


def test_misfit_seen_only_while_building_keeps_whole_rows(tmp_path, caplog):
    """A transform that is rarely no homography: what the first samples show does not decide."""
    logging.getLogger("hf_freezecache").propagate = True
    rare = v2.RandomApply([v2.RandomErasing(p=1.0)], p=0.05)
    pipeline = v2.Compose([v2.RandomHorizontalFlip(), *TO_PIXELS, rare])
    _, store = train(picture_dataset(64).with_transform(replayable(pipeline)), tmp_path, sensitivity_batches=1)
    assert store.manifest.geometry == "dense"
    assert not list(store.path.parent.glob("*.tmp-*"))


def test_views_that_show_little_of_the_base_view_are_kept_whole(tmp_path, caplog):
    logging.getLogger("hf_freezecache").propagate = True
    corner = v2.Compose([v2.CenterCrop(4), v2.Resize(16), *TO_PIXELS])
    anywhere = v2.Compose([v2.RandomCrop(8), v2.Resize(16), *TO_PIXELS])
    transform = ReplayableTransform(train=anywhere, base=corner)
    _, store = train(picture_dataset(size=32).with_transform(transform), tmp_path)
    assert store.manifest.geometry is None and store.manifest.views == 1
    assert "% of what views show is not in their base view" in caplog.text and "kB in all" in caplog.text


def test_fallback_that_the_budget_cannot_hold_is_declined(tmp_path, caplog):
    """What turned out to be necessary is more than what was planned."""
    _, planned = train(picture_dataset().with_transform(replayable()), tmp_path / "free", codec="int3")
    erasing = replayable(v2.Compose([*TO_PIXELS, v2.RandomErasing(p=1.0)]))
    config = manual("0:2", codec="int3", cache_budget=str(planned.total_bytes))
    settings = dict(num_train_epochs=1, remove_unused_columns=False)
    trainer = run(tiny_vit(), picture_dataset().with_transform(erasing), tmp_path / "run", config, **settings)
    assert "The store holds the geometry of every position" in caplog.text
    assert "of `cache_budget` are left" in caplog.text
    assert trainer.freeze_status().cut == 2 and not trainer.freeze_status().replaying
    assert not list((tmp_path / "run" / "_freeze_cache").glob("*"))


def test_opaque_draws_are_kept_whole_and_said(tmp_path, caplog):
    logging.getLogger("hf_freezecache").propagate = True
    trainer, store = train(picture_dataset().with_transform(OpaqueFlip()), tmp_path, views=2, codec="fp32")
    assert "3 whole draws" in caplog.text and "ReplayableTransform" in caplog.text
    assert store.manifest.views == 2 and store.manifest.geometry is None and store.manifest.own_inputs
    base, first = (store.read_rows(range(32), np.full(32, view)) for view in (0, 1))
    assert not torch.equal(base["base"], first["base"])
    source, chain = rows_of(trainer), chain_of(trainer)
    for batch in range(source.num_ranges):
        rows = source.rows(batch)
        codes = store.read_rows(rows, np.full(len(rows), 1))
        true = chain.prefix({"pixel_values": source.collate(rows, 1)["pixel_values"]}, 2)
        assert torch.equal(store.codec.decode(codes), true)


def test_no_views_of_random_data_says_that_augmentation_ends(tmp_path, caplog):
    logging.getLogger("hf_freezecache").propagate = True
    _, store = train(picture_dataset().with_transform(replayable()), tmp_path, views=0)
    assert "augmentation ends at the freeze point" in caplog.text and store.manifest.views == 0


def test_random_transform_is_said_once(tmp_path, caplog):
    def noisy(batch):
        rows = to_pixels(batch)
        rows["pixel_values"] = [pixels + torch.rand(1) for pixels in rows["pixel_values"]]
        return rows

    dataset = image_dataset().with_transform(noisy)
    run(tiny_vit(), dataset, tmp_path, manual("1:2,3:4"), data_collator=own_collator, remove_unused_columns=False)
    assert sum("whole draws of every sample" in record.message for record in caplog.records) == 1
    caplog.clear()
    steady = image_dataset().with_transform(to_pixels)
    run(tiny_vit(), steady, tmp_path, manual("1:2,3:4"), data_collator=own_collator, remove_unused_columns=False)
    assert not any("draws" in record.message for record in caplog.records)


def test_random_transform_is_said_when_a_store_is_reused(tmp_path, caplog):
    class Noisy(MixedSizes):
        def __getitem__(self, index):
            row = super().__getitem__(0)
            return {**row, "pixel_values": row["pixel_values"] + torch.rand(1)}

    config = manual("1:2", feature_cache_dir=str(tmp_path / "cache"))
    for name in ("first", "second"):
        caplog.clear()
        run(tiny_resnet(), Noisy(), tmp_path / name, config, num_train_epochs=2)
        assert sum("whole draws of every sample" in record.message for record in caplog.records) == 1
