"""Stores that are removed, cut short or overwritten while a training reads them: it goes on, with the right rows."""

import shutil
from pathlib import Path

import pytest
from support.helpers import assert_same_weights, losses, manual, pixel_dataset, run, tiny_vit, weights
from transformers import TrainerCallback

from benchmarks.faults.losses import LOSSES, Loss, overwrite, suffer_loss, train_frozen

QUICK = [
    Loss("removed", 10, 1),
    Loss("deleted", 8, 0),
    Loss("cut short", 8, 0),
    Loss("cut short", 10, 1),
    Loss("overwritten", 10, 0),
]
CASES = [loss if loss in QUICK else pytest.param(loss, marks=pytest.mark.slow) for loss in LOSSES]


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    return train_frozen(tmp_path_factory.mktemp("never"))


@pytest.mark.parametrize("loss", CASES, ids=lambda loss: f"{loss.way}-{loss.step}-{loss.workers}")
def test_a_store_that_is_lost_costs_no_training(loss, frozen, tmp_path):
    story = suffer_loss(loss, frozen, tmp_path / "run")
    assert story.survived, story
    assert story.replayed  # from the files that are held, or from another store


class OverwriteAt(TrainerCallback):
    def __init__(self, folder, step):
        self.folder, self.step = folder, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for store in self.folder.iterdir():
                overwrite(store)


def train(path, overwritten=None, codec="fp32", callbacks=(), resume=None):
    folder = Path(path) / "stores"
    damage = [] if overwritten is None else [OverwriteAt(folder, overwritten)]
    config = manual("1:2", codec=codec, feature_cache_dir=str(folder))
    return run(tiny_vit(), pixel_dataset(), path, config, resume, callbacks=[*callbacks, *damage], num_train_epochs=5)


class SaveAt(TrainerCallback):
    """Saves a checkpoint after these steps."""

    def __init__(self, *steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step in self.steps


@pytest.mark.parametrize(("step", "is_removed"), [(9, False), (10, True), (11, False), (12, True)])
def test_training_resumed_in_the_epoch_of_a_loss_is_the_uninterrupted_one(step, is_removed, tmp_path):
    """Epoch 2 reads the store in its first steps and images from the loss on; with a coarse codec they differ."""
    whole = train(tmp_path, 9, codec="int3", callbacks=[SaveAt(9, 10, 11, 12)])
    if is_removed:
        shutil.rmtree(tmp_path / "stores")
    resumed = train(tmp_path, codec="int3", resume=str(tmp_path / f"checkpoint-{step}"))
    assert losses(resumed) == losses(whole)
    assert_same_weights(weights(resumed), weights(whole))
    assert losses(whole) != losses(train(tmp_path / "unlost", codec="int3"))
