"""Stores of a training that others see, take away, damage, or find after it was killed."""

import os
import shutil

from support.builds import flip
from support.helpers import losses, manual, messages, pixel_dataset, run, tiny_vit
from transformers import TrainerCallback

from hf_freezecache import FeatureStore
from hf_freezecache.cache.cleaning import find_stores
from hf_freezecache.cache.store import remove_store


class AtEpoch(TrainerCallback):
    """Does something at the beginning of an epoch."""

    def __init__(self, epoch, act):
        self.epoch, self.act = epoch, act

    def on_epoch_begin(self, args, state, control, **kwargs):
        if round(state.epoch) == self.epoch:
            self.act()


def train(path, act=None, epoch=3, points="1:2", resume=None, epochs=5, workers=0, **settings):
    config = manual(points, feature_cache_dir=str(path / "cache"), **settings)
    callbacks = [] if act is None else [AtEpoch(epoch, act)]
    return run(
        tiny_vit(),
        pixel_dataset(),
        path,
        config,
        resume,
        callbacks=callbacks,
        num_train_epochs=epochs,
        dataloader_num_workers=workers,
    )


def test_store_taken_away_while_loader_processes_read_it_costs_nothing(tmp_path):
    def remove():
        (store,) = (tmp_path / "removed" / "cache").iterdir()
        remove_store(store)

    expected = train(tmp_path / "whole")
    for workers in (0, 1):
        shutil.rmtree(tmp_path / "removed", ignore_errors=True)
        trainer = train(tmp_path / "removed", remove, workers=workers)
        assert losses(trainer) == losses(expected) and trainer.freeze_status().replaying


def test_store_is_in_use_during_the_training_and_not_after_it(tmp_path):
    seen = []
    train(tmp_path, lambda: seen.extend(find_stores(tmp_path / "cache")))
    assert [store.running for store in seen] == [True] and str(os.getpid()) in seen[0].used_by
    (after,) = find_stores(tmp_path / "cache")
    assert not after.running and not any(name.startswith(".lease") for name in os.listdir(after.path))


class Killed(BaseException):
    """In the place of a signal that ends the process."""


class KillInReplay(TrainerCallback):
    """Ends the process after the first step of the first replay epoch."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.epoch > 1:
            raise Killed


def test_store_that_was_finished_just_before_a_kill_is_deleted_by_the_resumed_training(tmp_path):
    settings = {"num_train_epochs": 4, "save_strategy": "epoch"}
    config = manual("1:2,3:3", feature_cache_dir=str(tmp_path / "cache"))
    try:
        run(tiny_vit(), pixel_dataset(), tmp_path, config, callbacks=[KillInReplay()], **settings)
    except Killed:
        pass
    (first,) = (tmp_path / "cache").iterdir()
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    run(tiny_vit(), pixel_dataset(), tmp_path, config, str(checkpoint), **settings)
    (last,) = (tmp_path / "cache").iterdir()
    assert last != first and FeatureStore.open(last).manifest.cut == 3


class AfterEpoch(AtEpoch):
    """Does something at the end of an epoch."""

    def on_epoch_begin(self, args, state, control, **kwargs):
        pass

    def on_epoch_end(self, args, state, control, **kwargs):
        super().on_epoch_begin(args, state, control, **kwargs)


def test_damage_does_not_get_into_a_deeper_store(tmp_path, caplog):
    def damage():
        (store,) = (tmp_path / "damaged" / "cache").iterdir()
        flip(next(store.glob("*.arrow")), 4000)

    def train_deeper(name, deepen, *callbacks):
        config = manual("1:2,3:3", feature_cache_dir=str(tmp_path / name / "cache"), deepen=deepen)
        return run(tiny_vit(), pixel_dataset(), tmp_path / name, config, callbacks=list(callbacks), num_train_epochs=5)

    expected = train_deeper("images", "raw")
    trainer = train_deeper("damaged", "cache", AfterEpoch(3, damage))
    assert "is damaged" in messages(caplog) or "was lost while it was in use" in messages(caplog)
    assert losses(trainer) == losses(expected)
