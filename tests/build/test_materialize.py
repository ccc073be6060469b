"""Builds: which finished store matches, what a build never exceeds, and what a broken one leaves."""

import errno
import multiprocessing
import os
import shutil
import signal
import socket
import threading
from dataclasses import replace

import pytest
import torch
from support import zoo
from support.builds import Rows, build, collate, flip, make_spec, on_every_process
from support.codec_cases import NAMES
from support.helpers import tiny_vit
from support.packed_stores import assert_same_rows, pack

from hf_freezecache import FeatureStore
from hf_freezecache.build import materialize as building
from hf_freezecache.build.materialize import BuildFailed, OverLimit, materialize, open_matching
from hf_freezecache.cache import completing
from hf_freezecache.cache.manifest import StoreError
from hf_freezecache.cache.shards import ShardWriter
from hf_freezecache.distributed import Group

# What matches


@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "codec.safetensors", "manifest.json"])
@pytest.mark.parametrize("where", ["first", "middle"])
def test_damaged_store_is_not_reused_but_built_again(model, tmp_path, name, where):
    spec = make_spec(model, tmp_path)
    assert open_matching(spec, Group()) is None
    store = materialize(spec, Group())
    expected = store.read(range(22))
    assert open_matching(spec, Group()).path == store.path
    flip(store.path / name, 0 if where == "first" else (store.path / name).stat().st_size // 2)
    assert open_matching(spec, Group()) is None
    assert torch.equal(materialize(spec, Group()).read(range(22)), expected)
    assert open_matching(spec, Group()) is not None


def test_store_under_a_foreign_name_is_not_taken_for_a_match(model, tmp_path):
    """Somebody renames a store: its manifest says what it was made from."""
    other = build(model, tmp_path / "other", cut=3)
    spec = make_spec(model, tmp_path)
    shutil.copytree(other.path, spec.path)
    assert open_matching(spec, Group()) is None


def test_finished_store_is_found_again_by_its_kind_alone(tmp_path):
    plain = make_spec(tiny_vit(), tmp_path)
    assert open_matching(pack(plain), Group()) is None
    materialize(pack(plain), Group())
    assert open_matching(pack(plain), Group()).manifest.lossless
    assert open_matching(plain, Group()) is None


def test_damaged_store_is_taken_away_at_once(tmp_path, monkeypatch):
    spec = make_spec(tiny_vit().eval(), tmp_path)
    store = materialize(spec, Group())
    (store.path / "data-00000-of-00001.arrow").write_bytes(b"")
    monkeypatch.setattr(shutil, "rmtree", lambda path, **settings: None)
    assert open_matching(spec, Group()) is None
    assert not store.path.exists() and len(list(tmp_path.iterdir())) == 1


# Beside the prefix


@pytest.fixture
def beside(monkeypatch):
    """Encodes and writes in a thread, as where the host waits for an accelerator; notes the threads that do."""
    threads, write = set(), ShardWriter.write

    def noting(self, *args):
        threads.add(threading.get_ident())
        write(self, *args)

    monkeypatch.setattr(ShardWriter, "write", noting)
    monkeypatch.setattr(building, "_waits_for", lambda spec: True)
    return threads


@pytest.mark.parametrize("codec", ["fp16", "int4"])
def test_store_that_is_written_beside_the_prefix_has_the_same_bytes(model, codec, tmp_path, monkeypatch, beside):
    stores = []
    for name in ("beside", "in turn"):
        monkeypatch.setattr(building, "_waits_for", lambda spec, name=name: name == "beside")
        stores.append(materialize(make_spec(model, tmp_path / name, codec=codec), Group()))
        assert len(beside) == 1 and (threading.get_ident() in beside) == (name == "in turn")
        beside.clear()
    for path in stores[0].path.glob("data-*"):
        assert path.read_bytes() == (stores[1].path / path.name).read_bytes()


def test_what_fails_beside_the_prefix_leaves_nothing(model, tmp_path, monkeypatch, beside):
    def full(self, *args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "write", full)
    with pytest.raises(BuildFailed, match="No space left"):
        materialize(make_spec(model, tmp_path), Group())
    assert not list(tmp_path.glob("*/data-*"))


# Limits


def test_limit_is_kept_to_the_byte(model, tmp_path):
    spec = make_spec(model, tmp_path / "free")
    needed = sum(file.stat().st_size for file in materialize(spec, Group()).path.iterdir())
    limited = replace(spec, directory=tmp_path / "limited", limit=needed)
    store = materialize(limited, Group())
    assert sum(file.stat().st_size for file in store.path.iterdir()) == needed
    with pytest.raises(OverLimit, match=f"{needed:,} bytes, and only {needed - 1:,} are left"):
        materialize(replace(limited, directory=tmp_path / "less", limit=needed - 1), Group())
    assert not (tmp_path / "less").exists()


# Builds that fail


def build_until_killed(model, directory):
    """Runs in a process of its own."""
    write, calls = ShardWriter.write, []

    def kill_after_three(self, *args):
        write(self, *args)
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    ShardWriter.write = kill_after_three
    build(model, directory)


def test_killed_build_leaves_only_an_aside_directory_that_the_next_build_removes(model, tmp_path):
    process = multiprocessing.get_context("fork").Process(target=build_until_killed, args=(model, tmp_path))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    spec = make_spec(model, tmp_path)
    assert left.name.startswith(spec.path.name + ".tmp-") and any(left.glob("*.arrow"))
    with pytest.raises(StoreError):
        FeatureStore.open(left)
    assert open_matching(spec, Group()) is None
    store = materialize(spec, Group())
    assert list(tmp_path.iterdir()) == [store.path] and store.verify()


def test_aside_directory_of_a_living_process_or_another_host_is_left_alone(model, tmp_path):
    spec = make_spec(model, tmp_path)
    living = tmp_path / f"{spec.path.name}.tmp-{socket.gethostname()}-{os.getppid()}-abc"
    foreign = tmp_path / f"{spec.path.name}.tmp-elsewhere-1-abc"
    living.mkdir()
    foreign.mkdir()
    store = materialize(spec, Group())
    assert set(tmp_path.iterdir()) == {store.path, living, foreign}


@pytest.mark.parametrize("failing_write", [1, 4])
def test_full_disk_is_build_failed_and_leaves_nothing(model, tmp_path, monkeypatch, failing_write):
    write, calls = ShardWriter.write, []

    def full(self, *args):
        calls.append(1)
        if len(calls) == failing_write:
            raise OSError(28, "No space left on device")
        write(self, *args)

    monkeypatch.setattr(ShardWriter, "write", full)
    with pytest.raises(BuildFailed, match="No space left"):
        build(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_at_completion_is_build_failed_and_leaves_nothing(model, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(completing, "_write", full)
    with pytest.raises(BuildFailed, match="No space left"):
        build(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_directory_that_cannot_be_made_is_build_failed(model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BuildFailed):
        build(model, tmp_path / "file")


@pytest.mark.parametrize("codec", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bad", [2, 13, 21])
def test_feature_that_is_not_finite_names_its_sample(model, tmp_path, codec, value, bad):
    class Broken(Rows):
        def __getitem__(self, row):
            sample = super().__getitem__(row)
            if row == bad:
                sample["pixel_values"][0, 3, 3] = value
            return sample

    with pytest.raises(ValueError, match=rf"\b{bad}\b"):
        build(model, tmp_path, Broken(), codec=codec, cut=1)
    assert list(tmp_path.iterdir()) == []


def test_images_of_other_sizes_are_refused_by_sample(tmp_path):
    class Growing(Rows):
        def __getitem__(self, row):
            self.size = 32 if row < 12 else 48
            return super().__getitem__(row)

    with pytest.raises(ValueError, match="sample 12.*one size"):
        build(zoo.make("resnet"), tmp_path, Growing(), cut=2)
    assert list(tmp_path.iterdir()) == []


def test_labels_of_other_lengths_are_refused_by_sample(model, tmp_path):
    dataset = Rows(12, label=lambda row: torch.zeros(3 if row < 8 else 4))
    with pytest.raises(ValueError, match="labels.*sample 8"):
        build(model, tmp_path, dataset)
    dataset = Rows(12, label=lambda row: torch.zeros(3, dtype=torch.float32 if row < 8 else torch.float64))
    with pytest.raises(ValueError, match="labels.*sample 8"):
        build(model, tmp_path, dataset)


def test_constants_and_columns_that_change_are_refused_by_sample(model, tmp_path):
    def changing_constant(samples):
        batch = collate(samples)
        return {**batch, "scale": 1.0 if batch["labels"][0] == 0 else 2.0}

    def changing_columns(samples):
        batch = collate(samples)
        return batch if batch["labels"][0] == 0 else {**batch, "more": batch["labels"]}

    with pytest.raises(ValueError, match="constants differ.*sample 4"):
        build(model, tmp_path, collator=changing_constant)
    with pytest.raises(ValueError, match="'labels', 'more'.*sample 4"):
        build(model, tmp_path, collator=changing_columns)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["base", "special", "sample_id", "geometry"])
def test_column_named_as_one_of_the_stores_is_refused(model, tmp_path, name):
    def renamed(samples):
        batch = collate(samples)
        return {"pixel_values": batch["pixel_values"], name: batch["labels"]}

    with pytest.raises(ValueError, match=f"{name}.*clash"):
        build(model, tmp_path, collator=renamed)
    assert list(tmp_path.iterdir()) == []


# Several processes


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_store_does_not_depend_on_how_many_processes_wrote_it(model, tmp_path, processes):
    alone = build(model, tmp_path / "alone")
    spec = make_spec(model, tmp_path / "together")
    stores = on_every_process(processes, lambda group: materialize(spec, group))
    for store in stores:
        assert isinstance(store, FeatureStore), store
    store = stores[0]
    assert store.path.name == alone.path.name and len(store.manifest.shards) == processes
    assert list((tmp_path / "together").iterdir()) == [store.path]
    indices = [21, 0, 5, 5, 12, 3]
    assert torch.equal(store.read(indices), alone.read(indices))
    assert store.dataset.to_dict() == alone.dataset.to_dict()
    assert store.verify()


def test_failure_on_one_process_is_raised_on_all(model, tmp_path, monkeypatch):
    write = ShardWriter.write

    def full(self, *args):
        if "00001-of" in self.path.name:
            raise OSError(28, "No space left on device")
        write(self, *args)

    monkeypatch.setattr(ShardWriter, "write", full)
    spec = make_spec(model, tmp_path)
    errors = on_every_process(2, lambda group: materialize(spec, group))
    assert all(isinstance(error, BuildFailed) and "No space left" in str(error) for error in errors), errors
    assert list(tmp_path.iterdir()) == []


def test_more_processes_than_batches_writes_a_complete_store(model, tmp_path):
    spec = make_spec(model, tmp_path, Rows(3))
    for store in on_every_process(4, lambda group: materialize(spec, group)):
        assert isinstance(store, FeatureStore), store
        assert store.read_rows([2, 0])["labels"].tolist() == [2, 0]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_write_the_rows_of_one(processes, tmp_path):
    spec = pack(make_spec(tiny_vit(), tmp_path / "several"))
    alone = materialize(replace(spec, directory=tmp_path / "alone"), Group())
    for store in on_every_process(processes, lambda group: materialize(spec, group)):
        assert store.verify() and len(store.manifest.shards) == processes
        assert store.dataset[:] == alone.dataset[:]
        assert_same_rows(store, alone, 22)
