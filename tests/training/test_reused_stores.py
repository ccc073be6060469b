"""Trainings that share a folder of stores: none trains on features of other data, code or files."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.cached_evaluations import accuracy
from support.helpers import losses, manual, messages, pixel_dataset, run, through, tiny_vit
from support.images import OpaqueFlip, picture_dataset
from support.keepers import freeze, make_keeper

from hf_freezecache import FreezeCacheConfig
from hf_freezecache.build.errors import BuildFailed
from hf_freezecache.training.store_provider import Request


class Unhashable(torch.utils.data.Dataset):
    """Holds what nobody can compare."""

    def __init__(self):
        self.rows, self.handle = pixel_dataset(), (number for number in ())

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return self.rows[row]


def stores(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("materialize", ["upfront", "write_through"])
def test_resumed_training_of_an_unhashable_data_set_finds_its_store(materialize, tmp_path):
    config = manual("1:2", codec="fp32", materialize=materialize)
    whole = run(tiny_vit(), Unhashable(), tmp_path, config, save_strategy="epoch")
    before = stores(tmp_path / "_freeze_cache")
    for _ in range(2):
        checkpoint = str(tmp_path / "checkpoint-8")
        resumed = run(tiny_vit(), Unhashable(), tmp_path, config, save_strategy="epoch", resume=checkpoint)
        assert stores(tmp_path / "_freeze_cache") == before and len(before) == 1
    assert losses(resumed)[-4:] == losses(whole)[-4:]


def gained(variable):
    def transform(batch):
        gain = float(os.environ[variable])
        return {**batch, "pixel_values": [torch.as_tensor(image) * gain for image in batch["pixel_values"]]}

    return pixel_dataset().with_transform(transform)


@pytest.mark.parametrize("materialize", ["upfront", "write_through"])
def test_value_that_no_fingerprint_tells_makes_another_store(materialize, tmp_path, monkeypatch):
    def train(name):
        settings = dict(codec="fp32", materialize=materialize, feature_cache_dir=str(tmp_path / name))
        trainer = run(tiny_vit(), gained("TEST_GAIN"), tmp_path / "run", manual("0:2", **settings), num_train_epochs=3)
        return losses(trainer)

    monkeypatch.setenv("TEST_GAIN", "1.0")
    first = train("shared")
    monkeypatch.setenv("TEST_GAIN", "2.0")
    assert train("shared") == train("fresh") != first
    assert len(stores(tmp_path / "shared")) == 2


def test_replaced_file_of_an_evaluation_set_is_computed_again(tmp_path):
    class Files(torch.utils.data.Dataset):
        def __init__(self):
            self.paths = [str(tmp_path / f"{row}.npy") for row in range(20)]

        def __len__(self):
            return 20

        def __getitem__(self, row):
            return {"pixel_values": torch.from_numpy(np.load(self.paths[row])), "labels": row % 5}

    def write(rows, seed):
        for row in rows:
            pixels = np.random.default_rng((seed, row)).normal(size=(3, 16, 16))
            np.save(tmp_path / f"{row}.npy", pixels.astype("float32"))

    def evaluate(name):
        config = manual("0:2", cache_eval=True, feature_cache_dir=str(tmp_path / name))
        settings = dict(eval_dataset=Files(), eval_strategy="epoch", compute_metrics=accuracy, num_train_epochs=2)
        trainer = run(tiny_vit(), pixel_dataset(), tmp_path / "run", config, **settings)
        return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]

    write(range(20), 0)
    first = evaluate("shared")
    write([7], 1)
    assert evaluate("shared") == evaluate("fresh") != first


@pytest.mark.parametrize("factor", [1, 2])
def test_rows_that_an_interrupted_run_has_written_are_proved(factor, tmp_path):
    def begin():
        keeper = make_keeper(tmp_path, through("0:2", codec="fp32"))
        freeze(keeper, 2)
        with keeper.accounts.building(2) as phase:
            request = Request(2, 4, phase)
            return keeper.provider, keeper.provider.begin(request, decided=True), request

    _, partial, _ = begin()
    _, (view_run,) = next(iter(partial.spec.feature_source.run([0])))
    rows = list(partial.spec.source.rows(0))
    partial.write(rows, np.zeros(len(rows), np.int64), replace(view_run, features=view_run.features * factor))
    partial.close()
    provider, reopened, request = begin()
    assert reopened.reopened
    if factor == 1:
        store = provider.finish(reopened, request)
        assert stores(tmp_path) == [store.path.name]
        return
    with pytest.raises(BuildFailed, match="an earlier run has written"):
        provider.finish(reopened, request)
    assert stores(tmp_path) == []


def test_setting_is_checked_in_words():
    with pytest.raises(ValueError, match="reuse='always' is unknown; possible are never, proved, content"):
        FreezeCacheConfig(reuse="always")


class Flips(OpaqueFlip):
    """Flips at random; labels follow a value that no fingerprint tells, or are random themselves."""

    def __call__(self, rows):
        drawn = super().__call__(rows)
        shift, noisy = int(os.environ.get("TEST_SHIFT", 0)), os.environ.get("TEST_NOISY")
        labels = [(label + shift) % 5 if noisy is None else int(torch.randint(5, ())) for label in drawn["labels"]]
        return {**drawn, "labels": labels}


def write_draws(path, folder, resume=None, **settings):
    """Two live epochs write what they draw, two replay it."""
    dataset = picture_dataset().with_transform(Flips())
    config = through("0:2", codec="fp32", feature_cache_dir=str(folder))
    settings = dict(num_train_epochs=4, remove_unused_columns=False, save_strategy="epoch", resume=resume, **settings)
    return run(tiny_vit(), dataset, path, config, **settings)


def test_draws_that_do_not_come_again_are_nobody_elses(tmp_path):
    first = write_draws(tmp_path / "run", tmp_path / "stores")
    (store,) = stores(tmp_path / "stores")
    resumed = write_draws(tmp_path / "run", tmp_path / "stores", str(tmp_path / "run" / "checkpoint-12"))
    assert stores(tmp_path / "stores") == [store] and losses(resumed) == losses(first)
    second = write_draws(tmp_path / "second", tmp_path / "stores")
    assert len(stores(tmp_path / "stores")) == 2 and losses(second) == losses(first)
    assert [phase.mode for phase in second.freeze_cache_report().phases] == ["build", "live", "replay"]


def test_labels_beside_draws_that_do_not_come_again_are_compared(tmp_path, monkeypatch, caplog):
    write_draws(tmp_path / "run", tmp_path / "stores")
    (store,) = stores(tmp_path / "stores")
    monkeypatch.setenv("TEST_SHIFT", "1")
    resumed = write_draws(tmp_path / "run", tmp_path / "stores", str(tmp_path / "run" / "checkpoint-12"))
    assert "is not used: sample 0 differs in the model input 'labels'" in messages(caplog)
    assert resumed.freeze_status().store_path.name != store


def test_labels_that_are_drawn_too_are_no_difference(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TEST_NOISY", "1")
    first = write_draws(tmp_path / "run", tmp_path / "stores")
    assert first.freeze_status().replaying
    resumed = write_draws(tmp_path / "run", tmp_path / "stores", str(tmp_path / "run" / "checkpoint-12"))
    assert resumed.freeze_status().replaying and losses(resumed) == losses(first)
    assert "differs" not in messages(caplog) and len(stores(tmp_path / "stores")) == 1
