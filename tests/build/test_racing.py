"""Several runs that need the same store at the same moment: one builds it, the others wait for it and use it."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from support.builds import make_spec
from support.helpers import tiny_vit

from hf_freezecache.build.errors import BuildFailed, NotWritable
from hf_freezecache.build.feature_sources import ViewRun
from hf_freezecache.build.materialize import materialize, open_matching
from hf_freezecache.build.partial import PartialStore
from hf_freezecache.cache.rows import split_batch
from hf_freezecache.cache.shards import ShardWriter
from hf_freezecache.distributed import Group


def spec_in(directory):
    return make_spec(tiny_vit().eval(), directory)


def build_slowly(directory, results, die=False):
    """Runs in a process of its own; notes its number for each batch that it writes."""
    write = ShardWriter.write

    def slow(self, *args):
        write(self, *args)
        time.sleep(0.3)
        results.put(os.getpid())
        if die:
            results.close()
            results.join_thread()
            os.kill(os.getpid(), signal.SIGKILL)

    ShardWriter.write = slow
    store = materialize(spec_in(directory), Group())
    results.put(("path", str(store.path), store.verify()))


def start(directory, results, **settings):
    process = multiprocessing.get_context("fork").Process(
        target=build_slowly, args=(directory, results), kwargs=settings
    )
    process.start()
    return process


def drain(results):
    found = []
    while not results.empty():
        found.append(results.get())
    return found


def test_one_of_several_runs_builds_and_the_others_use_its_store(tmp_path):
    results = multiprocessing.get_context("fork").Queue()
    processes = [start(tmp_path, results) for _ in range(3)]
    for process in processes:
        process.join(timeout=120)
    found = drain(results)
    paths = [entry for entry in found if isinstance(entry, tuple)]
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(paths) == 3 and len(set(paths)) == 1 and len({entry for entry in found if isinstance(entry, int)}) == 1
    assert [path.name for path in tmp_path.iterdir()] == [spec_in(tmp_path).path.name]


def test_run_whose_builder_is_killed_builds_itself(tmp_path):
    results = multiprocessing.get_context("fork").Queue()
    dying = start(tmp_path, results, die=True)
    assert results.get(timeout=60) == dying.pid
    store = materialize(spec_in(tmp_path), Group())
    dying.join(timeout=60)
    assert dying.exitcode == -signal.SIGKILL and store.verify()
    assert list(tmp_path.iterdir()) == [store.path]


# Stores that epochs write


def write_all(partial, spec):
    for number in range(spec.source.num_ranges):
        rows = spec.source.rows(number)
        batch = split_batch(spec.source.collate(rows), spec.chain.main_input)
        features = spec.chain.prefix(spec.source.collate(rows), spec.cut)
        partial.write(list(rows), np.zeros(len(rows), np.int64), ViewRun(batch.columns, batch.constants, features))


def write_and_finish(directory, barrier, results):
    """Runs in a process of its own."""
    spec = spec_in(directory)
    barrier.wait(timeout=60)
    partial = PartialStore.begin(spec, Group())
    write_all(partial, spec)
    barrier.wait(timeout=60)
    store = partial.finish()
    results.put((str(store.path), store.verify()))


def test_two_runs_write_one_store_together(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=write_and_finish, args=(tmp_path, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    found = drain(results)
    assert len(found) == 2 and len(set(found)) == 1
    expected = materialize(spec_in(tmp_path / "alone"), Group())
    store = open_matching(spec_in(tmp_path), Group())
    assert torch.equal(store.read(range(22)), expected.read(range(22)))


def begin_and_wait(directory, begun, end):
    """Runs in a process of its own."""
    partial = PartialStore.begin(spec_in(directory), Group())
    begun.set()
    end.wait(timeout=60)
    write_all(partial, spec_in(directory))
    assert partial.finish().verify()


def test_run_that_gives_up_leaves_the_directory_to_the_other_one(tmp_path):
    context = multiprocessing.get_context("fork")
    begun, end = context.Event(), context.Event()
    other = context.Process(target=begin_and_wait, args=(tmp_path, begun, end))
    other.start()
    assert begun.wait(timeout=60)
    mine = PartialStore.begin(spec_in(tmp_path), Group())
    mine.remove()
    assert mine.path.exists()
    end.set()
    other.join(timeout=60)
    assert other.exitcode == 0 and not mine.path.exists()


# Directories that cannot be written


def refuse(*args, **kwargs):
    raise PermissionError(13, "Read-only file system")


def test_good_store_in_a_directory_that_cannot_be_written_is_used(tmp_path, monkeypatch):
    built = materialize(spec_in(tmp_path), Group())
    for name in ("mkdir", "rename", "unlink", "utime"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    store = open_matching(spec_in(tmp_path), Group())
    store.hold()
    assert store.verify() and store.path == built.path
    store.release()


@pytest.mark.parametrize("make", [materialize, PartialStore.begin])
def test_build_in_a_directory_that_cannot_be_written_is_refused_before_anything_runs(make, tmp_path, monkeypatch):
    spec = spec_in(tmp_path)
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr(type(spec.feature_source), "run", lambda *args, **settings: pytest.fail("the prefix ran"))
    with pytest.raises(NotWritable, match="not writable.*feature_cache_dir"):
        make(spec, Group())
    assert issubclass(NotWritable, BuildFailed)
