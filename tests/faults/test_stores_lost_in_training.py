"""Stores that are removed, cut short or overwritten while a training reads them: it goes on, with the right rows."""

import itertools
import shutil
from pathlib import Path

import pytest
from support.helpers import assert_same_weights, losses, make_args, manual, pixel_dataset, tiny_vit, weights
from transformers import TrainerCallback

from hf_freezecache import FreezeCacheTrainer
from hf_freezecache.cache.store import remove_store


def arrow_files(folder):
    return sorted(path for path in folder.glob("*/data-*.arrow") if ".tmp" not in path.parent.name)


def remove(folder):
    for path in arrow_files(folder):
        if path.parent.exists():
            remove_store(path.parent)


def delete(folder):
    for path in arrow_files(folder):
        shutil.rmtree(path.parent, ignore_errors=True)


def shorten(folder):
    for path in arrow_files(folder):
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size // 2)


def overwrite(folder):
    for path in arrow_files(folder):
        content = bytearray(path.read_bytes())
        for place in range(1000, len(content), 500):
            content[place] ^= 0xFF
        path.write_bytes(content)


class Damage(TrainerCallback):
    def __init__(self, folder, how, step):
        self.folder, self.how, self.step = folder, how, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.how(self.folder)


def train(path, how=None, step=0, cache="always", codec="fp32", callbacks=(), resume=None, **settings):
    folder = Path(path) / "stores"
    trainer = FreezeCacheTrainer(
        model=tiny_vit(),
        args=make_args(path, num_train_epochs=5, **settings),
        train_dataset=pixel_dataset(),
        freeze_cache=manual("1:2", cache=cache, codec=codec, feature_cache_dir=str(folder)),
        callbacks=[*callbacks, *([] if how is None else [Damage(folder, how, step)])],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    return train(tmp_path_factory.mktemp("never"), cache="never")


QUICK = [(remove, 10, 1), (shorten, 8, 0), (shorten, 10, 1), (overwrite, 10, 0)]
EVERY = itertools.product([remove, delete, shorten, overwrite], [8, 10], [0, 1])
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in EVERY if case not in QUICK)]


@pytest.mark.parametrize(("how", "step", "workers"), CASES)
def test_a_store_that_is_lost_costs_no_training(how, step, workers, oracle, tmp_path):
    trainer = train(tmp_path, how, step, dataloader_num_workers=workers)
    assert losses(trainer) == losses(oracle)
    assert_same_weights(weights(trainer), weights(oracle))
    assert trainer.freeze_status().replaying  # from the files that are held, or from another store


class SaveAt(TrainerCallback):
    """Saves a checkpoint after these steps."""

    def __init__(self, *steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step in self.steps


@pytest.mark.parametrize(("step", "is_removed"), [(9, False), (10, True), (11, False), (12, True)])
def test_training_resumed_in_the_epoch_of_a_loss_is_the_uninterrupted_one(step, is_removed, tmp_path):
    """Epoch 2 reads the store in its first steps and images from the loss on; with a coarse codec they differ."""
    whole = train(tmp_path, overwrite, 9, codec="int3", callbacks=[SaveAt(9, 10, 11, 12)])
    if is_removed:
        shutil.rmtree(tmp_path / "stores")
    resumed = train(tmp_path, codec="int3", resume=str(tmp_path / f"checkpoint-{step}"))
    assert losses(resumed) == losses(whole)
    assert_same_weights(weights(resumed), weights(whole))
    assert losses(whole) != losses(train(tmp_path / "unlost", codec="int3"))
