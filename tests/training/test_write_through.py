"""Trainings whose live epochs write the store."""

import shutil

import numpy as np
import pytest
import torch
from support.helpers import assert_same_weights, losses, make_args, messages, run, through, tiny_vit, weights
from support.images import FlipAndErase, OpaqueFlip, picture_dataset, pictures_with_a_marked_one, replayable
from support.sessions import chain_of
from transformers import TrainerCallback

from hf_freezecache import FreezeCacheTrainer
from hf_freezecache.cache.store import FeatureStore

SETTINGS = dict(num_train_epochs=4, remove_unused_columns=False)


def test_status_and_report_tell_the_writing_epochs(tmp_path, caplog):
    seen = []

    class Look(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            seen.append((self.trainer.freeze_status().replaying, self.trainer.freeze_status().store_bytes > 0))

    look = Look()
    trainer = FreezeCacheTrainer(
        model=tiny_vit(),
        args=make_args(tmp_path, **SETTINGS),
        train_dataset=picture_dataset().with_transform(replayable()),
        freeze_cache=through(),
        callbacks=[look],
    )
    look.trainer = trainer
    trainer.train()
    assert seen == [(False, False), (False, False), (True, True), (True, True)]
    phases = {phase.mode: phase for phase in trainer.freeze_cache_report().phases}
    assert {mode: phase.epochs for mode, phase in phases.items()} == {"build": 1, "live": 2, "replay": 2}
    assert phases["live"].store_bytes > 0 and phases["build"].store_bytes == trainer.freeze_status().store_bytes
    assert phases["replay"].flops < phases["live"].flops
    assert "Built the feature store" in messages(caplog)


def test_too_few_epochs_build_upfront_and_say_so(tmp_path, caplog):
    dataset = picture_dataset().with_transform(replayable())
    late = run(tiny_vit(), dataset, tmp_path / "w", through("2:2"), **SETTINGS)
    upfront = run(tiny_vit(), dataset, tmp_path / "u", through("2:2", materialize="upfront"), **SETTINGS)
    assert losses(late) == losses(upfront)
    assert "a build makes the store, not live epochs, because writing it takes 2 epochs, and 2 remain" in messages(
        caplog
    )
    assert late.freeze_status().replaying
    assert [phase.epochs for phase in late.freeze_cache_report().phases if phase.mode == "build"] == [1]


def test_next_freeze_gives_an_unfinished_store_up(tmp_path):
    dataset = picture_dataset().with_transform(replayable())
    trainer = run(tiny_vit(), dataset, tmp_path, through("0:2,1:3"), **SETTINGS)
    assert trainer.freeze_status().replaying and trainer.freeze_status().cut == 3
    [path] = (tmp_path / "_freeze_cache").iterdir()
    assert FeatureStore.open(path).manifest.cut == 3


def test_finished_stores_are_replayed_at_once(tmp_path):
    dataset = picture_dataset().with_transform(replayable())
    for materialize in ("write_through", "upfront"):
        cache = dict(feature_cache_dir=str(tmp_path / materialize))
        first = run(tiny_vit(), dataset, tmp_path / "1", through(materialize=materialize, **cache), **SETTINGS)
        second = run(tiny_vit(), dataset, tmp_path / "2", through(**cache), **SETTINGS)
        assert second.freeze_status() == first.freeze_status()
        assert [phase.mode for phase in second.freeze_cache_report().phases] == ["build", "replay"]


def test_opaque_draws_are_stored_as_they_were_trained_on(tmp_path):
    pictures = picture_dataset()
    trainer = run(tiny_vit(), pictures.with_transform(OpaqueFlip()), tmp_path, through(codec="fp32"), **SETTINGS)
    store = FeatureStore.open(trainer.freeze_status().store_path)
    assert store.views.spec.whole and store.views.spec.own_inputs and store.manifest.views == 1
    chain, rows = chain_of(trainer), np.arange(32)
    both = [store.codec.decode(store.read_rows(rows, np.full(32, view))) for view in (0, 1)]
    images = torch.stack([replayable().base(image) for image in pictures["image"]])
    plain, mirrored = [chain.prefix({"pixel_values": drawn}, 2) for drawn in (images, images.flip(-1))]
    for view in both:
        same = [(part - view).abs().flatten(1).amax(1) < 1e-5 for part in (plain, mirrored)]
        assert (same[0] ^ same[1]).all() and same[0].any() and same[1].any()


def rare_misfit():
    return pictures_with_a_marked_one(49).with_transform(replayable(FlipAndErase()))


def test_misfit_on_the_way_builds_upfront(tmp_path, caplog):
    """The erased picture is not among those that the channels are chosen on."""
    trainer = run(tiny_vit(), rare_misfit(), tmp_path, through(sensitivity_batches=1), **SETTINGS)
    assert "A build makes the feature store, not live epochs, because the geometry of a view" in messages(caplog)
    assert trainer.freeze_status().replaying
    [path] = (tmp_path / "_freeze_cache").iterdir()
    store = FeatureStore.open(path)
    assert store.manifest.geometry == "dense" and "materialize" not in store.manifest.made_from


@pytest.mark.parametrize("step", [5, 7])
def test_resumed_after_a_misfit_is_uninterrupted(step, tmp_path):
    config = through(sensitivity_batches=1)

    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == step

    whole = run(tiny_vit(), rare_misfit(), tmp_path / "run", config, callbacks=[Save()], **SETTINGS)
    shutil.rmtree(tmp_path / "run" / "_freeze_cache")
    resumed = run(tiny_vit(seed=7), rare_misfit(), tmp_path / "run", config, resume=True, **SETTINGS)
    assert losses(resumed) == losses(whole)
    assert_same_weights(weights(resumed), weights(whole))
