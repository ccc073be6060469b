"""A head start where blocks are frozen from the start: they run once, for the store, or not at all if there is one."""

import pytest
import torch
from support.helpers import (
    assert_same_weights,
    losses,
    manual,
    messages,
    pixel_dataset,
    run,
    through,
    tiny_resnet,
    tiny_vit,
    weights,
)
from support.images import picture_dataset, replayable
from support.pretrained import settle
from support.sized_images import GroupingTrainer, SizedImages
from support.sounds import PadSounds, Sounds, wav2vec2
from support.token_rows import Pad, Texts, bert, xlnet
from transformers import TrainerCallback

from hf_freezecache import FreezeCacheConfig
from hf_freezecache.cache.manifest import StoreError
from hf_freezecache.cache.store import FeatureStore
from hf_freezecache.policies import AutoPolicy, Trial

ROWS = 64


class AtFirstStep(TrainerCallback):
    """Copies the weights that the first step begins with."""

    weights = None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.weights is None:
            self.weights = {name: value.clone() for name, value in model.state_dict().items()}


class CountsRows:
    """Counts the samples of whole batches that run through a model's first layer; proofs take fewer at a time."""

    def __init__(self, model, batch_size: int = 8):
        self.rows, self.batch_size = 0, batch_size
        kinds = torch.nn.Conv2d | torch.nn.Conv1d | torch.nn.Embedding
        next(each for each in model.modules() if isinstance(each, kinds)).register_forward_hook(self)

    def __call__(self, module, args, output):
        self.rows += len(output) if len(output) == self.batch_size else 0


def config(points="0:2", **settings):
    return manual(points, **{"codec": "fp32", "head_start_epochs": 2, **settings})


def vit():
    return settle(tiny_vit())


def resnet():
    return settle(tiny_resnet())


def started(folder, settings, make=vit, data=None, **more):
    """The trainer, the weights before the first step, and the samples that the first layer has run on."""
    seen, model = AtFirstStep(), make()
    count = CountsRows(model)
    data = pixel_dataset(ROWS) if data is None else data
    callbacks = [seen, *more.pop("callbacks", [])]
    trainer = run(model, data, folder, settings, callbacks=callbacks, **{"num_train_epochs": 2, **more})
    return trainer, seen.weights, count.rows


def phase_of(trainer, mode="head_start"):
    return next(phase for phase in trainer.freeze_cache_report().phases if phase.mode == mode)


@pytest.mark.parametrize("make", [vit, resnet])
def test_frozen_blocks_run_once_and_the_head_is_that_of_one_from_samples(make, tmp_path):
    data = pixel_dataset(ROWS, 32 if make is resnet else 16)
    _, _, without = started(tmp_path / "without", config(head_start_epochs=0), make, data)
    trainer, head, rows = started(tmp_path / "store", config(), make, data)
    frozen, from_samples, _ = started(tmp_path / "samples", config(cache="never"), make, data)
    assert rows == without and rows >= ROWS
    assert_same_weights(head, from_samples)
    assert_same_weights(weights(trainer), weights(frozen))
    assert losses(trainer) == losses(frozen)


def test_the_report_counts_the_blocks_from_the_cut_on(tmp_path):
    trainer, _, _ = started(tmp_path / "store", config())
    other, _, _ = started(tmp_path / "samples", config(cache="never"))
    phase, whole = phase_of(trainer), phase_of(other)
    assert (phase.cut, whole.cut) == (2, 0) and phase.steps == whole.steps
    assert phase.flops + phase_of(trainer, "build").flops == pytest.approx(whole.flops, rel=1e-3)
    modes = [each.mode for each in trainer.freeze_cache_report().phases]
    assert modes == ["build", "head_start", "replay"]


def test_a_store_that_is_there_spares_all_of_them(tmp_path):
    shared = {"feature_cache_dir": str(tmp_path / "cache")}
    first, head, _ = started(tmp_path / "first", config(**shared))
    second, again, rows = started(tmp_path / "second", config(**shared))
    _, _, without = started(tmp_path / "without", config(head_start_epochs=0, **shared))
    assert rows == without  # up to 256 rows of a store of an earlier run are proved
    assert phase_of(second, "build").epochs == 0 and phase_of(second).flops == phase_of(first).flops
    assert_same_weights(head, again)
    assert_same_weights(weights(first), weights(second))
    assert second.freeze_status().store_path == first.freeze_status().store_path


def test_features_are_those_that_the_training_gets(tmp_path):
    """With a codec that loses something, the head is trained on what is left."""
    _, exact, _ = started(tmp_path / "exact", config())
    _, coarse, _ = started(tmp_path / "coarse", config(codec="int4"))
    assert any(not torch.equal(exact[name], coarse[name]) for name in ("classifier.weight", "classifier.bias"))
    assert torch.allclose(exact["classifier.weight"], coarse["classifier.weight"], atol=0.05)


@pytest.mark.parametrize("settings", [{"cache": "auto"}, {"cache": "always", "materialize": "write_through"}])
def test_without_a_store_it_takes_samples(settings, tmp_path):
    """Of tiny trainings no store pays; and while the epochs write one there is none."""
    trainer, head, _ = started(tmp_path / "store", config(**settings), num_train_epochs=3)
    _, from_samples, _ = started(tmp_path / "samples", config(cache="never"), num_train_epochs=3)
    assert_same_weights(head, from_samples)
    assert phase_of(trainer).cut == 0


def test_a_store_that_epochs_have_written_before_is_taken(tmp_path):
    shared = {"feature_cache_dir": str(tmp_path / "cache"), "codec": "fp32", "head_start_epochs": 2}
    started(tmp_path / "first", through(**shared), num_train_epochs=3)
    trainer, _, _ = started(tmp_path / "second", through(**shared), num_train_epochs=3)
    assert phase_of(trainer).cut == 2


def test_a_codec_that_asks_the_head_gets_a_trained_one(tmp_path):
    trainer, head, _ = started(tmp_path / "store", config(codec="mixed"))
    _, from_samples, _ = started(tmp_path / "samples", config(cache="never"))
    assert_same_weights(head, from_samples)
    assert [phase.mode for phase in trainer.freeze_cache_report().phases] == ["head_start", "build", "replay"]


def test_layer_decay_that_freezes_from_the_start_shares_the_store(tmp_path):
    settings = {"layer_decay": 0.5, "layer_decay_min": 0.2, "head_start_epochs": 2, "codec": "fp32"}
    trainer, _, _ = started(tmp_path, FreezeCacheConfig(cache="always", **settings), num_train_epochs=4)
    assert phase_of(trainer).cut == 2


class FreezesAtOnce(AutoPolicy):
    """Says the trial what it likes to hear."""

    def __init__(self, freezes: bool):
        super().__init__()
        self.freezes = freezes

    def take_trial(self, trial, num_blocks):
        assert trial is not None
        sign = -1.0 if self.freezes else 1.0
        return super().take_trial(Trial(trial.cut, trial.steps, trial.samples, [1 + sign] * 2, [1.0] * 2), num_blocks)


@pytest.mark.parametrize("freezes", [pytest.param(True, marks=pytest.mark.slow), False])
def test_after_a_trial_the_head_is_trained_from_the_store_or_on_more_samples(freezes, tmp_path, caplog):
    caplog.set_level("INFO", logger="hf_freezecache")
    settings = FreezeCacheConfig(cache="always", codec="fp32", head_start_epochs=2)
    more = dict(policy=FreezesAtOnce(freezes), num_train_epochs=10)
    trainer, head, rows = started(tmp_path / "auto", settings, data=pixel_dataset(160), **more)
    modes = [phase.mode for phase in trainer.freeze_cache_report().phases]
    assert modes[:3] == (["trial", "build", "head_start"] if freezes else ["trial", "head_start", "live"])
    assert phase_of(trainer).cut == (2 if freezes else 0)
    assert "on features of 144 samples" in caplog.text  # 16 were held out
    if not freezes:  # what ran for the trial does not run again
        assert phase_of(trainer).flops < phase_of(trainer, "trial").flops / 2
    samples = dict(policy=FreezesAtOnce(freezes), num_train_epochs=10)
    never = FreezeCacheConfig(cache="never", head_start_epochs=2)
    _, other, _ = started(tmp_path / "never", never, data=pixel_dataset(160), **samples)
    assert_same_weights(head, other)


@pytest.mark.parametrize(
    ("make", "data", "more"),
    [
        (bert, Texts(32), {"data_collator": Pad()}),
        (xlnet, Texts(32), {"data_collator": Pad()}),
        (wav2vec2, Sounds(32), {"data_collator": PadSounds()}),
        (tiny_resnet, SizedImages(32), {"trainer_class": GroupingTrainer, "per_device_train_batch_size": 4}),
    ],
    ids=["texts", "texts whose padding counts", "sounds", "sizes"],
)
def test_samples_of_several_widths_and_sizes_are_read_from_their_store(make, data, more, tmp_path):
    more = {"remove_unused_columns": False, **more}
    new = dict(head_start="always", head_start_lr=0.01)
    trainer, head, _ = started(tmp_path / "store", config(**new), lambda: settle(make()), data, **more)
    _, other, _ = started(tmp_path / "samples", config(cache="never", **new), lambda: settle(make()), data, **more)
    assert phase_of(trainer).cut == 2 and trainer.freeze_status().replaying
    assert head.keys() == other.keys()
    for name, value in head.items():
        assert torch.allclose(value, other[name], atol=2e-4), name


@pytest.mark.parametrize("sensitive", [0.25, 1.0])
def test_of_augmented_samples_it_takes_the_base_view(sensitive, tmp_path):
    data = picture_dataset(32).with_transform(replayable())
    settings = config(views=1, sensitive_fraction=sensitive)
    trainer, head, _ = started(tmp_path / "store", settings, data=data, remove_unused_columns=False)
    never = config(cache="never")
    _, other, _ = started(tmp_path / "samples", never, data=data, remove_unused_columns=False)
    assert phase_of(trainer).cut == 2
    assert_same_weights(head, other)


def test_a_selection_reads_its_rows_of_the_store_of_all(tmp_path):
    data = pixel_dataset(ROWS).select(range(40, 8, -1))
    trainer, head, _ = started(tmp_path / "store", config(share_store=True), data=data)
    _, other, _ = started(tmp_path / "samples", config(cache="never"), data=data)
    assert phase_of(trainer).cut == 2 and FeatureStore.open(trainer.freeze_status().store_path).manifest.rows == ROWS
    assert_same_weights(head, other)


def test_loader_processes_read_the_store(tmp_path):
    _, head, _ = started(tmp_path / "processes", config(), dataloader_num_workers=1)
    _, other, _ = started(tmp_path / "none", config())
    assert_same_weights(head, other)


def test_a_store_that_cannot_be_read_leaves_the_samples(tmp_path, monkeypatch, caplog):
    def fails(self, *args, **kwargs):
        raise StoreError("it is gone.")

    class Breaks(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            monkeypatch.undo()

    def once(self, indices, views=None, pinned=False, read_rows=FeatureStore.read_rows):
        return fails(self) if views is None and len(indices) == 8 else read_rows(self, indices, views, pinned)

    monkeypatch.setattr(FeatureStore, "read_rows", once)
    trainer, head, _ = started(tmp_path / "store", config(), callbacks=[Breaks()])
    _, other, _ = started(tmp_path / "samples", config(cache="never"))
    assert "could not be read" in messages(caplog)
    tried, done = [each for each in trainer.freeze_cache_report().phases if each.mode == "head_start"]
    assert (tried.cut, tried.steps, done.cut) == (2, 0, 0)
    assert_same_weights(head, other)


def test_resumed_trainings_get_none(tmp_path):
    settings = dict(save_strategy="epoch", num_train_epochs=3)
    whole, _, _ = started(tmp_path / "run", config(), **settings)
    seen = str(tmp_path / "run" / "checkpoint-8")
    resumed, first, _ = started(tmp_path / "run", config(), resume=seen, **settings)
    assert_same_weights(weights(resumed), weights(whole))
    assert [phase.mode for phase in resumed.freeze_cache_report().phases].count("head_start") == 1
