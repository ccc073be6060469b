"""Trainings on selections of rows of one data set: folds that read one store."""

import re
from pathlib import Path

import datasets
import numpy as np
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
    tiny_vit,
    weights,
)
from support.images import OpaqueFlip, picture_dataset
from support.token_rows import Pad, Texts, bert
from torch.utils.data import Dataset, Subset

from hf_freezecache import FeatureStore
from hf_freezecache.build import spec_maker
from hf_freezecache.cache.names import OWNER
from hf_freezecache.estimate.costs import PlanRow

ROWS = 40


def folds(count=3):
    """Rows of the training set of each fold of a shuffled cross-validation."""
    order = np.random.default_rng(7).permutation(ROWS)
    return [np.delete(order, np.arange(number, ROWS, count)) for number in range(count)]


def stores(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def assert_as_frozen(dataset, tmp_path, config, model=tiny_vit, **settings):
    """Trains on features, and with frozen blocks on samples: the same to the last bit."""
    cached = run(model(), dataset, tmp_path / "run", config, **settings)
    frozen = run(model(), dataset, tmp_path / "frozen", manual(config.freeze_points, cache="never"), **settings)
    assert losses(cached) == losses(frozen)
    assert_same_weights(weights(cached), weights(frozen))
    return cached


def shared(tmp_path, points="0:2", **settings):
    return manual(points, codec="fp32", share_store=True, feature_cache_dir=str(tmp_path / "shared"), **settings)


def consecutive_folds(table, count=3):
    """Training sets of an unshuffled cross-validation: the first and the last one are ranges."""
    return [table.select(np.delete(np.arange(ROWS), part)) for part in np.array_split(np.arange(ROWS), count)]


@pytest.mark.parametrize("kept", ["memory", "one file", "files"])
def test_consecutive_folds_cost_one_build(kept, tmp_path, caplog):
    table, found = pixel_dataset(ROWS), set()
    if kept != "memory":
        table.save_to_disk(tmp_path / "data", num_shards=1 if kept == "one file" else 3)
        table = datasets.load_from_disk(tmp_path / "data").with_format("torch")
    ranges = consecutive_folds(table)
    assert [dataset._indices is None for dataset in ranges] == [True, False, True]
    for dataset in [*ranges, table.train_test_split(0.25, shuffle=False)["train"]]:
        trainer = assert_as_frozen(dataset, tmp_path, shared(tmp_path), num_train_epochs=2)
        assert trainer.freeze_status().replaying
        found.add(trainer.freeze_status().store_path)
    assert len(found) == 1
    assert messages(caplog).count("Built the feature store") == 1


def test_range_reads_the_store_of_a_training_on_all_rows(tmp_path):
    table, settings = pixel_dataset(ROWS), {"codec": "fp32", "feature_cache_dir": str(tmp_path / "shared")}
    run(tiny_vit(), table, tmp_path / "whole", manual("0:2", **settings), num_train_epochs=1)
    before = stores(tmp_path / "shared")
    assert_as_frozen(table.select(range(9, 33)), tmp_path, manual("0:2", **settings), num_train_epochs=2)
    assert stores(tmp_path / "shared") == before


def test_range_of_pieces_in_memory_builds_its_own_store_and_says_so(tmp_path, caplog):
    pieces = datasets.concatenate_datasets([pixel_dataset(ROWS), pixel_dataset(ROWS, seed=1)])
    trainer = assert_as_frozen(pieces.select(range(9, 60)), tmp_path, shared(tmp_path), num_train_epochs=2)
    assert FeatureStore.open(trainer.freeze_status().store_path).manifest.rows == 51
    assert "its table lies in memory in 2 pieces" in messages(caplog) and "shuffle(seed=0)" in messages(caplog)


def test_range_of_a_file_that_was_replaced_builds_its_own_store_and_says_so(tmp_path, caplog):
    for number in range(2):
        pixel_dataset(ROWS, seed=number).save_to_disk(tmp_path / f"data {number}")
    table = datasets.load_from_disk(tmp_path / "data 0")
    name = Path(table.cache_files[0]["filename"]).name
    (tmp_path / "data 1" / name).replace(tmp_path / "data 0" / name)
    trainer = assert_as_frozen(table.select(range(9, 33)), tmp_path, shared(tmp_path), num_train_epochs=2)
    assert FeatureStore.open(trainer.freeze_status().store_path).manifest.rows == 24
    assert "holds other rows than when it was opened" in messages(caplog)


@pytest.mark.parametrize("selected", ["select", "subset", "subset of a selection", "filter"])
def test_folds_cost_one_build(selected, tmp_path, caplog):
    table, found = pixel_dataset(ROWS), set()
    for rows in folds():
        dataset = {
            "select": lambda rows=rows: table.select(rows),
            "subset": lambda rows=rows: Subset(table, rows.tolist()),
            "subset of a selection": lambda rows=rows: Subset(table.shuffle(seed=1), rows.tolist()),
            "filter": lambda rows=rows: table.filter(
                lambda _, row, rows=rows: row in set(rows.tolist()), with_indices=True
            ),
        }[selected]()
        trainer = assert_as_frozen(dataset, tmp_path, shared(tmp_path), num_train_epochs=2)
        assert trainer.freeze_status().replaying
        found.add(trainer.freeze_status().store_path)
    assert len(found) == 1
    assert messages(caplog).count("Built the feature store") == 1


def test_automatic_decision_weighs_the_rows_of_the_training_and_tells_what_all_rows_take(
    tmp_path, caplog, monkeypatch
):
    """As if an epoch from samples took an hour."""
    monkeypatch.setattr(PlanRow, "seconds_saved_per_epoch", property(lambda row: 3600.0))
    table, rows = pixel_dataset(ROWS), folds()[0]
    config = shared(tmp_path, cache="auto")
    trainer = run(tiny_vit(), table.select(rows), tmp_path / "run", config, num_train_epochs=4)
    assert trainer.freeze_status().replaying
    told = re.search(
        r"a build takes about (\S+ \S+) for all rows, (\S+ \S+) of it for this training's", messages(caplog)
    )
    assert told is not None
    whole, own = (float(text.split()[0]) * (1000 if text.endswith(" s") else 1) for text in told.groups())
    assert whole / own == pytest.approx(ROWS / len(rows), rel=0.02)


def test_fold_reads_the_store_of_a_training_on_all_rows(tmp_path):
    table, settings = pixel_dataset(ROWS), {"codec": "fp32", "feature_cache_dir": str(tmp_path / "shared")}
    run(tiny_vit(), table, tmp_path / "whole", manual("0:2", **settings), num_train_epochs=1)
    before = stores(tmp_path / "shared")
    for rows in folds(2):
        assert_as_frozen(table.select(rows), tmp_path, manual("0:2", **settings), num_train_epochs=2)
    assert stores(tmp_path / "shared") == before


def test_all_rows_are_read_only_where_a_store_may_be_theirs(tmp_path, monkeypatch):
    read = []
    digest = spec_maker.dataset_inputs
    monkeypatch.setattr(spec_maker, "dataset_inputs", lambda *args: read.append(args) or digest(*args))
    config = manual("0:2", codec="fp32", feature_cache_dir=str(tmp_path / "shared"))
    for count, rows in enumerate(folds(2)):
        trainer = run(tiny_vit(), pixel_dataset(ROWS).select(rows), tmp_path / "run", config, num_train_epochs=1)
        assert trainer.freeze_status().replaying and len(read) == count


def test_fold_builds_its_own_rows_if_not_asked_to_share(tmp_path):
    config = manual("0:2", codec="fp32", feature_cache_dir=str(tmp_path / "shared"))
    rows = folds()[0]
    trainer = run(tiny_vit(), pixel_dataset(ROWS).select(rows), tmp_path / "run", config, num_train_epochs=1)
    assert FeatureStore.open(trainer.freeze_status().store_path).manifest.rows == len(rows)


def test_loader_processes_read_the_rows_of_the_fold(tmp_path):
    table = pixel_dataset(ROWS)
    for rows in folds(2):
        assert_as_frozen(table.select(rows), tmp_path, shared(tmp_path), dataloader_num_workers=2, num_train_epochs=2)


def test_resumed_fold_goes_on_from_the_shared_store(tmp_path):
    table, rows = pixel_dataset(ROWS), folds()[1]
    settings = dict(save_strategy="epoch", num_train_epochs=3)
    whole = run(tiny_vit(), table.select(rows), tmp_path / "run", shared(tmp_path), **settings)
    before = stores(tmp_path / "shared")
    checkpoint = str(tmp_path / "run" / "checkpoint-4")
    resumed = run(tiny_vit(), table.select(rows), tmp_path / "run", shared(tmp_path), resume=checkpoint, **settings)
    assert losses(resumed) == losses(whole)
    assert stores(tmp_path / "shared") == before


def test_stores_of_trained_blocks_are_each_folds_own(tmp_path, caplog):
    """The first store is everybody's and stays; blocks that were trained before they froze are of one training."""
    table = pixel_dataset(ROWS)
    for deepen, rows in zip(["raw", "cache", "raw"], folds(), strict=True):
        config = shared(tmp_path, "0:1,1:3", deepen=deepen)
        trainer = run(tiny_vit(), table.select(rows), tmp_path / "run", config, num_train_epochs=2)
        if deepen == "raw":
            assert_as_frozen(table.select(rows), tmp_path, config, num_train_epochs=2)
        assert FeatureStore.open(trainer.freeze_status().store_path).manifest.rows == len(rows)
    found = [FeatureStore.open(tmp_path / "shared" / name) for name in stores(tmp_path / "shared")]
    assert sorted((store.manifest.cut, store.manifest.rows) for store in found)[0] == (1, ROWS)
    assert [store.manifest.cut for store in found].count(1) == 1
    assert "cannot be extended" in messages(caplog)


def test_shared_store_belongs_to_no_training(tmp_path):
    rows = folds()[0]
    trainer = run(tiny_vit(), pixel_dataset(ROWS).select(rows), tmp_path / "run", shared(tmp_path), num_train_epochs=1)
    assert not (Path(trainer.freeze_status().store_path) / OWNER).exists()


def test_epochs_do_not_write_a_shared_store(tmp_path, caplog):
    config = through("0:2", codec="fp32", share_store=True)
    assert_as_frozen(pixel_dataset(ROWS).select(folds()[0]), tmp_path, config)
    assert "not all that share_store stores" in messages(caplog)


def test_texts_of_a_fold_are_read_from_the_shared_store(tmp_path, caplog):
    rows = Texts(ROWS)
    for chosen in folds(2):
        trainer = run(bert(), Subset(rows, chosen.tolist()), tmp_path / "run", shared(tmp_path), data_collator=Pad())
        frozen = run(
            bert(),
            Subset(rows, chosen.tolist()),
            tmp_path / "frozen",
            manual("0:2", cache="never"),
            data_collator=Pad(),
        )
        assert trainer.freeze_status().replaying
        np.testing.assert_allclose(losses(trainer), losses(frozen), rtol=1e-5)
    assert messages(caplog).count("Built the feature store") == 1


def test_views_are_drawn_for_the_fold_so_that_nothing_is_shared(tmp_path):
    table = picture_dataset(ROWS).with_transform(OpaqueFlip())
    for rows in folds(2):
        trainer = run(tiny_vit(), table.select(rows), tmp_path / "run", shared(tmp_path), remove_unused_columns=False)
        assert trainer.freeze_status().replaying
    assert len(stores(tmp_path / "shared")) == 2


def test_changed_row_of_the_table_is_not_replayed(tmp_path):
    table, rows = pixel_dataset(ROWS), folds()[0]
    run(tiny_vit(), table.select(rows), tmp_path / "run", shared(tmp_path), num_train_epochs=1)
    changed = pixel_dataset(ROWS, seed=1)
    assert_as_frozen(changed.select(rows), tmp_path, shared(tmp_path), num_train_epochs=2)
    assert len(stores(tmp_path / "shared")) == 2
    assert not torch.equal(changed[0]["pixel_values"], table[0]["pixel_values"])


# Selections of data sets that are more than a table


class Rows(Dataset):
    """Rows that are read by key, without a length."""

    def __init__(self, keys):
        self.rows = dict(zip(keys, pixel_dataset(ROWS), strict=True))

    def __getitem__(self, key):
        return dict(self.rows[key])


class Keyed(Rows):
    def __len__(self):
        return len(self.rows)


class Readable(Keyed):
    """Some rows cannot be read: they are left out of the selection."""

    def __getitem__(self, row):
        if row % 7 == 3:
            raise OSError(f"row {row} cannot be read")
        return super().__getitem__(row)


class ReadableTexts(Texts):
    def __getitem__(self, row):
        if row % 7 == 3:
            raise OSError(f"text {row} cannot be read")
        return super().__getitem__(row)


def names(rows):
    return [f"row {row}" for row in rows]


INTACT = [row for row in range(ROWS) if row % 7 != 3]
SELECTED = {
    "keys": lambda: Subset(Keyed(names(range(ROWS))), names(INTACT)),
    "without a length": lambda: Subset(Rows(range(ROWS)), INTACT),
    "counted from the end": lambda: Subset(pixel_dataset(ROWS), [row - ROWS for row in INTACT]),
    "others cannot be read": lambda: Subset(Readable(range(ROWS)), INTACT),
    "several times": lambda: Subset(pixel_dataset(ROWS), [1, 1, 2, 2, 3, 3, 3, 9] * 4),
}


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("selected", SELECTED)
def test_selections_of_any_data_set_are_cached(selected, share, tmp_path, caplog):
    run(tiny_vit(), pixel_dataset(ROWS), tmp_path / "whole", shared(tmp_path), num_train_epochs=1)
    config = shared(tmp_path) if share else manual("0:2", codec="fp32", feature_cache_dir=str(tmp_path / "shared"))
    trainer = assert_as_frozen(SELECTED[selected](), tmp_path, config, num_train_epochs=2, remove_unused_columns=False)
    assert trainer.freeze_status().replaying
    refused = "a store of all rows, which share_store asks for, cannot be made"
    assert (refused in messages(caplog)) == (share and selected == "others cannot be read")


@pytest.mark.parametrize("share", [False, True])
def test_texts_that_are_left_out_need_not_be_readable(share, tmp_path):
    config = manual("0:2", share_store=share)
    chosen = Subset(ReadableTexts(ROWS), INTACT)
    assert run(bert(), chosen, tmp_path, config, data_collator=Pad()).freeze_status().replaying


def test_all_rows_that_do_not_fit_are_not_shared(tmp_path, caplog):
    rows = np.arange(0, ROWS, 10)
    config = shared(tmp_path, cache_budget="14kB")
    trainer = assert_as_frozen(pixel_dataset(ROWS).select(rows), tmp_path, config, num_train_epochs=2)
    store = FeatureStore.open(trainer.freeze_status().store_path)
    assert (store.manifest.rows, store.manifest.codec) == (len(rows), "fp32")
    assert "a store of all rows, which share_store asks for, cannot be made" in messages(caplog)
