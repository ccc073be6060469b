"""Stores that are removed, replaced, cut short or changed while loader processes read them."""

import gc
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from support.builds import Rows, build, collate, flip
from support.helpers import tiny_vit
from support.processes import run_code, warm_context
from torch.utils.data import DataLoader

from hf_freezecache import FeatureStore
from hf_freezecache.cache.manifest import StoreError
from hf_freezecache.replay.collator import ReplayCollator, take_codes, take_lost
from hf_freezecache.replay.dataset import ReplayDataset
from hf_freezecache.replay.requests import SourceSwitch, stamp_rows


@pytest.fixture
def store(tmp_path):
    return build(tiny_vit().eval(), tmp_path)


def zero(row):
    return 0  # a lambda could not be sent to a process that is no fork of this one


def loader_of(store, workers=1, persistent=False, context=None):
    """A loader of a replay epoch, and its switch."""
    if context == "forkserver":  # its processes have nothing but what they are sent
        context = warm_context()
    switch = SourceSwitch(len(store))
    dataset = ReplayDataset(Rows(label=zero), switch, seed=0)
    loader = DataLoader(
        dataset,
        batch_size=4,
        num_workers=workers,
        persistent_workers=persistent,
        multiprocessing_context=context,
        collate_fn=ReplayCollator(collate),
        prefetch_factor=1 if workers else None,
    )
    stamp_rows(loader, switch)
    return loader, switch


def codes_of(loader, switch):
    with switch.requesting():
        return [take_codes(batch).codes["base"] for batch in loader]


def cut_short(store):
    file = store.path / store.manifest.shards[0].name
    os.truncate(file, file.stat().st_size // 2)


def damage(store):
    flip(store.path / store.manifest.shards[0].name, 5000)


@pytest.mark.parametrize(("context", "persistent"), [("fork", False), ("fork", True), ("forkserver", False)])
def test_loader_processes_read_on_when_the_store_was_removed(context, persistent, store):
    """Also those that begin, or see the store for the first time, when it is gone."""
    loader, switch = loader_of(store, persistent=persistent, context=context)
    expected = store.read_rows(range(len(store)))["base"]
    live = len([batch for batch in loader])  # persistent processes begin before the store is theirs
    switch.set(store.path, store.handle)
    shutil.rmtree(store.path)
    for _ in range(2):
        assert torch.equal(torch.cat(codes_of(loader, switch)), expected)
    assert live == 6
    del loader
    gc.collect()


def test_store_that_was_built_again_at_its_path_is_not_taken_for_the_one_in_use(store, tmp_path):
    """Another process opens the files that this one holds, not those that have their names by now."""
    other = build(tiny_vit().train(), tmp_path / "other", codec="int8")
    expected = store.read_rows(range(4))["base"]
    shutil.rmtree(store.path)
    shutil.copytree(other.path, store.path)
    with warm_context().Pool(1) as pool:
        assert torch.equal(pool.apply(read_first, (pickle.dumps(store),)), expected)


def read_first(pickled):
    return pickle.loads(pickled).read_rows(range(4))["base"]


@pytest.mark.parametrize("harm", [cut_short, damage])
@pytest.mark.parametrize("workers", [0, 1])
def test_rows_of_a_store_that_is_cut_short_or_damaged_while_it_is_read_are_lost(harm, workers, store):
    loader, switch = loader_of(store, workers)
    switch.set(store.path, store.handle)
    assert len(codes_of(loader, switch)) == 6
    harm(store)
    with switch.requesting():
        lost = [take_lost(batch) for batch in loader]
    assert all("data-00000-of-00001.arrow" in why and "StoreError" in why for why, _ in lost)
    assert [row for _, rows in lost for row in rows.numbers.tolist()] == list(range(len(store)))
    with pytest.raises(StoreError, match="data-00000-of-00001.arrow"):
        store.check_unchanged()


def test_loss_in_the_middle_of_an_epoch_reaches_the_training(store):
    loader, switch = loader_of(store)
    switch.set(store.path, store.handle)
    with switch.requesting():
        batches = iter(loader)
        next(batches)
        cut_short(store)
        *_, last = batches
        assert take_lost(last) is not None and take_codes(last) is None


def test_file_cut_short_does_not_end_the_process(store, tmp_path):
    """Mapped memory would: it is tried in a process of its own, between the check and the reading."""
    code = f"""
import os, sys
from hf_freezecache import FeatureStore
store = FeatureStore.open({str(store.path)!r})
store.check_unchanged = lambda: None
store.read(range(4))
os.truncate(store.path / store.manifest.shards[0].name, 3000)
try:
    store.read(range(22))
except Exception as error:
    print(type(error).__name__, error)
"""
    done = run_code(code, tmp_path)
    assert done.returncode == 0 and "StoreError" in done.stdout and "cut short" in done.stdout, done.stderr


def test_untouched_store_is_unchanged_and_not_read_again(store, monkeypatch):
    monkeypatch.setattr("hf_freezecache.cache.held_files.HeldFile.verify", lambda self: pytest.fail("it was read"))
    store.check_unchanged()


def test_touched_store_is_verified_once(store):
    file = store.path / store.manifest.shards[0].name
    os.utime(file)
    store.check_unchanged()
    store.check_unchanged()
    assert torch.isfinite(store.read(range(22))).all()


def test_damage_with_the_old_time_of_change_is_found(store):
    file = store.path / store.manifest.shards[0].name
    before = file.stat()
    damage(store)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(StoreError, match="is damaged"):
        store.check_unchanged()


def test_removed_store_is_unchanged(store):
    shutil.rmtree(store.path)
    store.check_unchanged()
    with pytest.raises(StoreError, match="is missing|not a feature store"):
        store.verify()
    with pytest.raises(StoreError):
        FeatureStore.open(store.path)


def test_store_errors_survive_the_way_to_another_process():
    error = pickle.loads(pickle.dumps(StoreError("row 3 is damaged")))
    assert type(error) is StoreError and str(error) == "row 3 is damaged"


def test_rows_are_those_of_datasets(store):
    assert np.array_equal(store.read_rows(range(22))["base"].numpy(), np.array(store.dataset["base"][:], np.uint8))
