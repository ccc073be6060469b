"""What users do with the training's loader: look into it, wrap it, rebuild it, draw rows several times."""

import gc
import weakref

import pytest
import torch
from support.builds import Rows, collate
from support.helpers import (
    assert_same_weights,
    losses,
    make_args,
    manual,
    messages,
    pixel_dataset,
    run,
    tiny_vit,
    weights,
)
from support.images import picture_dataset, replayable
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler
from transformers import TrainerCallback

from hf_freezecache import FreezeCacheTrainer


def train(trainer_class, dataset, directory, config, resume=None, data_collator=None, callbacks=(), **settings):
    """Trains with a trainer of the user's own."""
    trainer = trainer_class(
        model=tiny_vit(seed=7 if resume else 0),
        args=make_args(directory, **settings),
        train_dataset=dataset,
        data_collator=data_collator,
        callbacks=list(callbacks),
        freeze_cache=config,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class SaveAt(TrainerCallback):
    """Saves a checkpoint at one step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == self.step


class Look(TrainerCallback):
    """Looks at a batch of the train loader, as callbacks that log pictures do."""

    def __init__(self):
        self.shapes = []

    def look(self, loader):
        self.shapes.append(tuple(next(iter(loader))["pixel_values"].shape))

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self.look(train_dataloader)

    def on_step_end(self, args, state, control, train_dataloader=None, **kwargs):
        if state.global_step % 3 == 0:
            self.look(train_dataloader)

    on_epoch_end = on_epoch_begin


@pytest.mark.parametrize("workers", [0, 2])
def test_callbacks_that_look_into_the_loader_see_images_and_change_nothing(workers, tmp_path):
    trained = {}
    for cache in ("always", "never"):
        look = Look()
        config = manual("1:2", cache=cache, codec="fp32")
        settings = dict(callbacks=[look], dataloader_num_workers=workers)
        trained[cache] = run(tiny_vit(), pixel_dataset(), tmp_path / cache, config, **settings)
        assert set(look.shapes) == {(8, 3, 16, 16)} and len(look.shapes) == 8 + 16 // 3
    assert trained["always"].freeze_status().replaying and not trained["never"].freeze_status().replaying
    assert losses(trained["always"]) == losses(trained["never"])
    assert_same_weights(weights(trained["always"]), weights(trained["never"]))


class Around(FreezeCacheTrainer):
    """With a loader of the user's own."""

    def get_train_dataloader(self):
        return self.around(super().get_train_dataloader())


class Passing:
    passes = 1

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        for _ in range(self.passes):
            yield from self.loader


class Sized(Passing):
    def __len__(self):
        return self.passes * len(self.loader)


class Twice(Sized):
    passes = 2


class Touching(Sized):
    def __iter__(self):
        for batch in self.loader:
            yield {**batch, "pixel_values": batch["pixel_values"].clamp(-1, 1)}


class Kept(Sized):
    """One iteration that goes on from epoch to epoch, a batch ahead."""

    def endless(self):
        while True:
            yield from self.loader

    def __iter__(self):
        if not hasattr(self, "batches"):
            self.batches = self.endless()
        for _ in range(len(self)):
            yield next(self.batches)


def own(trainer, loader):
    """A loader that the user makes of the same data set."""
    sampler = RandomSampler(loader.dataset, generator=torch.Generator().manual_seed(3))
    return DataLoader(loader.dataset, batch_size=8, sampler=sampler, collate_fn=collate)


def train_around(make, cache, directory, **settings):
    class Mine(Around):
        around = make

    config = manual("1:2", cache=cache, codec="fp32")
    return train(Mine, Rows(32), directory, config, data_collator=collate, **settings)


@pytest.mark.parametrize("make", [Sized, Twice, Kept])
def test_wrapped_loader_trains_the_same_from_features(make, tmp_path):
    cached = train_around(lambda self, loader: make(loader), "always", tmp_path / "a")
    live = train_around(lambda self, loader: make(loader), "never", tmp_path / "b")
    assert losses(cached) == losses(live) and len(losses(live)) == 16 * make.passes
    assert cached.freeze_status().replaying


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda self, loader: Touching(loader), "fails on a batch of features in the place of samples"),
        (own, "do not come through the trainer's sampler"),
    ],
)
def test_loader_that_features_do_not_pass_reads_images(make, why, tmp_path, caplog):
    live = train_around(make, "never", tmp_path / "never")
    declined = train_around(make, "auto", tmp_path / "auto")
    assert losses(declined) == losses(live) and not declined.freeze_status().replaying
    assert messages(caplog).count(why) == 1
    with pytest.raises(ValueError, match=why):
        train_around(make, "always", tmp_path / "always")


def test_loader_without_a_length_trains(tmp_path):
    cached = train_around(lambda self, loader: Passing(loader), "always", tmp_path / "a", max_steps=12)
    live = train_around(lambda self, loader: Passing(loader), "never", tmp_path / "b", max_steps=12)
    assert losses(cached) == losses(live) and len(losses(live)) == 12
    assert cached.freeze_status().replaying


class EachEpoch(WeightedRandomSampler):
    """Draws the same rows in an epoch wherever the training begins."""

    def set_epoch(self, epoch):
        self.generator.manual_seed(epoch)


class Weighted(FreezeCacheTrainer):
    """Draws one row for most of an epoch, and notes its pixels."""

    def _get_train_sampler(self, dataset=None):
        weights = [10.0 if row == 3 else 0.2 for row in range(32)]
        return EachEpoch(weights, 32, generator=torch.Generator())

    def compute_loss(self, model, inputs, *args, **kwargs):
        numbers = inputs.pop("number")
        if inputs["pixel_values"].ndim == 4 and self.model.training and self.state.global_step < 4:
            for number, pixels in zip(numbers.tolist(), inputs["pixel_values"], strict=True):
                self.seen = [*getattr(self, "seen", []), pixels.numpy().tobytes()] if number == 3 else self.seen
        return super().compute_loss(model, inputs, *args, **kwargs)

    seen: list = []


@pytest.mark.parametrize("settings", [dict(views=2), dict(views=1, materialize="write_through")])
def test_row_that_is_drawn_often_is_drawn_anew_also_after_a_resume(settings, tmp_path):
    data = picture_dataset().add_column("number", list(range(32))).with_transform(replayable())
    config = manual("1:2", **settings)
    run_settings = dict(num_train_epochs=5, remove_unused_columns=False)
    whole = train(Weighted, data, tmp_path / "run", config, callbacks=[SaveAt(14)], **run_settings)
    assert len(whole.seen) > 15 and len(set(whole.seen)) > 0.8 * len(whole.seen)
    resumed = train(Weighted, data, tmp_path / "run", config, resume=True, **run_settings)
    assert losses(resumed) == losses(whole)
    assert_same_weights(weights(resumed), weights(whole))


class Fold(FreezeCacheTrainer):
    """Half of the rows are another fold's."""

    def _get_train_sampler(self, dataset=None):
        rows = [row for row in range(32) if row % 8 < 4]
        return SubsetRandomSampler(rows, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("collator", "why"),
    [
        (lambda samples: collate(sorted(samples, key=lambda sample: sample["pixel_values"].mean().item())), "sorts"),
        (lambda samples: collate([s for s in samples if s["labels"] != 2]), "drops or adds"),
    ],
)
def test_collator_whose_rows_are_no_samples_trains_on_images(collator, why, tmp_path, caplog):
    def train_fold(cache):
        config = manual("0:2", cache=cache, codec="fp32")
        return train(Fold, Rows(32), tmp_path / cache, config, data_collator=collator)

    assert losses(train_fold("auto")) == losses(train_fold("never"))
    assert why in messages(caplog)
    with pytest.raises(ValueError, match=why):
        train_fold("always")


class OnDevice(FreezeCacheTrainer):
    """Augments batches on the device."""

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        if not self.model.training:
            return inputs
        return {**inputs, "pixel_values": inputs["pixel_values"] + torch.randn(())}


def test_augmentation_on_the_device_is_never_lost(tmp_path, caplog):
    def train_on_device(cache):
        config = manual("1:2", cache=cache, codec="fp32")
        return train(OnDevice, pixel_dataset(), tmp_path / cache, config)

    assert losses(train_on_device("auto")) == losses(train_on_device("never"))
    assert "augments batches on the device" in messages(caplog)
    with pytest.raises(ValueError, match="on the device"):
        train_on_device("always")


@pytest.mark.parametrize("settings", [dict(cache="never"), dict(codec="fp32", cache_eval=True)])
def test_trainer_that_is_dropped_goes_at_once(settings, tmp_path):
    """As `Trainer`, and its loader processes too: after a garbage collection, torch waits five seconds for each."""
    workers = dict(dataloader_num_workers=1, dataloader_persistent_workers=True, num_train_epochs=2)
    config = manual("0:2", **settings)
    trainer = run(
        tiny_vit(), pixel_dataset(), tmp_path, config, eval_dataset=pixel_dataset(8), eval_strategy="epoch", **workers
    )
    reference = weakref.ref(trainer)
    gc.disable()
    try:
        del trainer
        assert reference() is None
    finally:
        gc.enable()
