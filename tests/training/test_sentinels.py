"""What changes after a store was built, in one training: the frozen training without a cache is the oracle."""

import numpy as np
import pytest
import torch
from support.helpers import (
    CLASSES,
    assert_same_weights,
    losses,
    make_args,
    manual,
    pixel_dataset,
    tiny_vit,
    weights,
)
from support.sessions import session_of
from torch.utils.data import Dataset
from transformers import TrainerCallback

from hf_freezecache import FreezeCacheTrainer
from hf_freezecache.training.session import MismatchError


class Pixels(Dataset):
    """Rows in memory that callbacks can change."""

    def __init__(self, rows=32):
        data = pixel_dataset(rows)
        self.pixels, self.labels = torch.stack(list(data["pixel_values"][:])), data["labels"][:].clone()
        self.epoch, self.strength = 0, 0.0

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        pixels = self.pixels[row]
        if self.strength:
            noise = np.random.default_rng((self.epoch, row)).normal(size=(3, 1, 1)).astype("float32")
            pixels = pixels + self.strength * torch.from_numpy(noise)
        return {"pixel_values": pixels, "labels": self.labels[row]}


class Change(TrainerCallback):
    """Base of callbacks that change something in the course of a training."""

    def __init__(self, dataset):
        self.dataset = dataset


class Relabels(Change):
    def on_epoch_end(self, args, state, control, **kwargs):
        if round(state.epoch) == 2:
            self.dataset.labels[:] = (self.dataset.labels + 1) % CLASSES


class ReplacesImages(Change):
    def on_epoch_end(self, args, state, control, **kwargs):
        if round(state.epoch) == 2:
            self.dataset.pixels = self.dataset.pixels.flip(-1)


class DrawsFromEpoch(Change):
    """Reproducible augmentation, drawn from epoch and row."""

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.epoch, self.dataset.strength = round(state.epoch), 0.5


class GrowsStronger(Change):
    """Augmentation that begins after the freeze."""

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.epoch, self.dataset.strength = round(state.epoch), max(0.0, round(state.epoch) - 1.0)


class Averages(Change):
    """Loads a running average of the weights into the model."""

    average = None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        now = {name: value.detach().clone() for name, value in model.state_dict().items()}
        before = now if self.average is None else self.average
        self.average = {name: 0.95 * before[name] + 0.05 * value for name, value in now.items()}

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        if round(state.epoch) == 3:
            model.load_state_dict(self.average)


class AveragesThroughData(Averages):
    """The same behind autograd's back, as many scripts do."""

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        if round(state.epoch) == 3:
            for name, value in model.state_dict().items():
                value.data.copy_(self.average[name])


class Unfreezes(Change):
    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        if round(state.epoch) == 2:
            model.requires_grad_(True)


class UnfreezesInTheEpoch(Change):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 10:
            next(iter(model.vit.parameters())).requires_grad_(True)


class EditsForward(Change):
    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        if round(state.epoch) == 2:
            embeddings, forward = model.vit.embeddings, model.vit.embeddings.forward
            embeddings.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)


CHANGES = [
    Relabels,
    ReplacesImages,
    DrawsFromEpoch,
    GrowsStronger,
    Averages,
    AveragesThroughData,
    Unfreezes,
    UnfreezesInTheEpoch,
    EditsForward,
]


def train(change, path, cache, **settings):
    dataset = Pixels()
    trainer = FreezeCacheTrainer(
        model=tiny_vit(),
        args=make_args(path, num_train_epochs=5, learning_rate=1e-2),
        train_dataset=dataset,
        freeze_cache=manual("1:2", **{"cache": cache, "codec": "fp32", "views": 3, **settings}),
        callbacks=[] if change is None else [change(dataset)],
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_build_ends_the_replay_and_nothing_is_trained_wrongly(change, tmp_path, caplog):
    never, always = train(change, tmp_path / "never", "never"), train(change, tmp_path / "always", "always")
    assert losses(always) == losses(never)
    assert_same_weights(weights(always), weights(never))
    assert "training goes on from samples" in caplog.text
    assert not always.freeze_status().replaying and session_of(always).keeper.mismatch is not None


def test_a_coarse_codec_hides_no_change(tmp_path, caplog):
    always = train(ReplacesImages, tmp_path, "always", codec="int2")
    assert "differs in features" in caplog.text and not always.freeze_status().replaying


@pytest.mark.parametrize("codec", ["fp32", "int4", "int2"])
def test_nothing_changed_is_no_mismatch(codec, tmp_path, caplog):
    trainer = train(None, tmp_path, "always", codec=codec)
    assert trainer.freeze_status().replaying and "goes on from samples" not in caplog.text


def test_the_log_names_row_and_cause(tmp_path, caplog):
    train(Relabels, tmp_path, "always")
    assert "differs in the model input 'labels'" in caplog.text and "Probably what the data set" in caplog.text
    caplog.clear()
    train(Unfreezes, tmp_path / "again", "always")
    assert "was made trainable again while it is frozen" in caplog.text


@pytest.mark.parametrize("change", [Relabels, Averages, UnfreezesInTheEpoch])
def test_a_mismatch_is_an_error_where_that_is_asked_for(change, tmp_path):
    with pytest.raises(MismatchError, match="on_mismatch='fallback'"):
        train(change, tmp_path, "always", on_mismatch="error")


def test_a_resumed_training_remembers_the_mismatch(tmp_path):
    def run(resume=None):
        dataset = Pixels()
        trainer = FreezeCacheTrainer(
            model=tiny_vit(),
            args=make_args(tmp_path / "run", num_train_epochs=5, save_strategy="epoch"),
            train_dataset=dataset,
            freeze_cache=manual("1:2", codec="fp32"),
            callbacks=[Relabels(dataset)],
        )
        if resume is not None:
            dataset.labels[:] = (dataset.labels + 1) % CLASSES
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run()
    resumed = run(str(tmp_path / "run" / "checkpoint-12"))
    assert_same_weights(weights(resumed), weights(whole))
    assert session_of(resumed).keeper.mismatch == session_of(whole).keeper.mismatch


class Rarely(Dataset):
    """Draws at random for two rows of 64, which no survey of a few rows may see."""

    def __init__(self):
        self.inner = Pixels(64)

    def __len__(self):
        return 64

    def __getitem__(self, row):
        item = self.inner[row]
        if row in (13, 41):
            item["pixel_values"] = item["pixel_values"] + torch.randn(3, 1, 1)
        return item


def test_randomness_of_few_rows_is_found_in_the_course_of_the_epochs(tmp_path, caplog):
    trainer = FreezeCacheTrainer(
        model=tiny_vit(),
        args=make_args(tmp_path, num_train_epochs=24, logging_steps=100),
        train_dataset=Rarely(),
        freeze_cache=manual("0:2", codec="fp32"),
    )
    trainer.train()
    store = session_of(trainer).store
    assert store is None or store.manifest.views > 0  # augmented, whichever way
