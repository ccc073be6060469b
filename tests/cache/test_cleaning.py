"""Stores and remains of builds are found and deleted; running builds and directories of users are not."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hf_freezecache.cache.cleaning import Removable, find_stores, remove
from hf_freezecache.cache.directories import create_aside
from hf_freezecache.cache.names import MANIFEST, SEEN, aside_path, partial_path, removed_path

FINGERPRINT = "0123456789abcdef" * 2
HOUR, DAY = 3600, 24 * 3600


@pytest.fixture
def dead_process() -> int:
    """Number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert not psutil.pid_exists(process.pid)
    return process.pid


def make_directory(path: Path, size: int = 100, age: float = 0) -> Path:
    """A directory with one file, both changed `age` seconds ago."""
    path.mkdir()
    (path / "data-00000-of-00001.arrow").write_bytes(bytes(size))
    for each in (path / "data-00000-of-00001.arrow", path):
        os.utime(each, (time.time() - age,) * 2)
    return path


def make_store(path: Path, fingerprint: object) -> Path:
    path.mkdir()
    (path / MANIFEST).write_text(json.dumps({"fingerprint": fingerprint, "format_version": 1}))
    return path


def only(directory: Path) -> Removable:
    (removable,) = find_stores(directory)
    return removable


def test_store_is_known_by_the_manifest_with_its_name_whatever_its_version(tmp_path):
    path = make_store(tmp_path / FINGERPRINT, FINGERPRINT)
    assert only(tmp_path) == Removable(path, (path / MANIFEST).stat().st_size, finished=True, running=False)


@pytest.mark.parametrize("fingerprint", ["f" * 32, None, ["list"]])
def test_directory_with_another_manifest_is_not_a_store(fingerprint, tmp_path):
    make_store(tmp_path / FINGERPRINT, fingerprint)
    assert find_stores(tmp_path) == []


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff", b"3"])
def test_directory_without_a_readable_manifest_is_not_a_store(content, tmp_path):
    path = make_directory(tmp_path / FINGERPRINT)
    if content is not None:
        (path / MANIFEST).write_bytes(content)
    assert find_stores(tmp_path) == []


@pytest.mark.parametrize("name", [FINGERPRINT, partial_path(Path(FINGERPRINT)).name, SEEN])
def test_build_of_this_machine_runs_as_long_as_its_process(name, dead_process, tmp_path):
    final = tmp_path / name
    path = make_directory(aside_path(final, socket.gethostname(), os.getpid()), age=2 * DAY)
    assert only(tmp_path) == Removable(path, 100, finished=False, running=True)
    path = path.rename(aside_path(final, socket.gethostname(), dead_process))
    assert only(tmp_path) == Removable(path, 100, finished=False, running=False)


@pytest.mark.parametrize(("age", "running"), [(0, True), (DAY - 60, True), (DAY + 60, False)])
def test_build_of_another_machine_runs_as_long_as_its_files_change(age, running, tmp_path):
    make_directory(aside_path(tmp_path / FINGERPRINT, "elsewhere", os.getpid()), age=age)
    assert only(tmp_path).running == running


@pytest.mark.parametrize(("age", "running"), [(0, True), (HOUR - 60, True), (HOUR + 60, False)])
def test_store_that_epochs_write_waits_an_hour_for_a_resumed_training(age, running, tmp_path):
    path = make_directory(partial_path(tmp_path / FINGERPRINT), age=age)
    assert only(tmp_path) == Removable(path, 100, finished=False, running=running)


def test_change_of_any_file_counts(tmp_path):
    path = make_directory(partial_path(tmp_path / FINGERPRINT), age=HOUR + 60)
    assert not only(tmp_path).running
    (path / "deeper").mkdir()
    (path / "deeper" / "file").write_bytes(b"new")
    os.utime(path / "deeper", (0, 0))
    os.utime(path, (0, 0))
    assert only(tmp_path).running


def test_store_that_was_being_deleted_is_listed_at_once(tmp_path):
    path = make_directory(removed_path(tmp_path / FINGERPRINT))
    assert only(tmp_path) == Removable(path, 100, finished=False, running=False)


@pytest.mark.parametrize(
    "name", ["photos", FINGERPRINT[:-1], "photos.partial", "photos.tmp-host-1-0a", "a.removed.tmp-0a"]
)
def test_directories_of_users_are_ignored(name, tmp_path):
    make_store(tmp_path / name, name)
    assert find_stores(tmp_path) == []


def test_links_and_files_are_ignored(tmp_path):
    directory, elsewhere = tmp_path / "stores", tmp_path / "elsewhere"
    directory.mkdir()
    elsewhere.mkdir()
    store = make_store(elsewhere / FINGERPRINT, FINGERPRINT)
    (directory / FINGERPRINT).symlink_to(store, target_is_directory=True)
    partial_path(directory / FINGERPRINT).write_bytes(b"a file")
    assert find_stores(directory) == []


def test_size_is_that_of_all_files_and_of_no_link(tmp_path):
    path = make_directory(removed_path(tmp_path / FINGERPRINT), size=100)
    (path / "deeper").mkdir()
    (path / "deeper" / "file").write_bytes(bytes(23))
    (tmp_path / "large").write_bytes(bytes(1000))
    (path / "link").symlink_to(tmp_path / "large")
    assert only(tmp_path).bytes == 123


def test_missing_directory_is_an_error(tmp_path):
    with pytest.raises(NotADirectoryError, match="is not a directory"):
        find_stores(tmp_path / "missing")


def test_remove_deletes_what_no_build_writes_and_counts_its_bytes(tmp_path):
    removed = make_directory(removed_path(tmp_path / FINGERPRINT), size=70)
    given_up = make_directory(partial_path(tmp_path / ("a" * 32)), size=7, age=HOUR + 60)
    running = make_directory(partial_path(tmp_path / ("b" * 32)), size=1000)
    stores = find_stores(tmp_path)
    assert {store.path for store in stores} == {removed, given_up, running}
    assert remove(stores) == 77
    assert list(tmp_path.iterdir()) == [running]


def test_remove_that_fails_is_an_error(tmp_path):
    with pytest.raises(OSError):
        remove([Removable(tmp_path / FINGERPRINT, 1, finished=True)])


def test_build_leaves_the_directory_of_a_host_whose_name_begins_like_its_own(dead_process, tmp_path):
    final, host = tmp_path / FINGERPRINT, socket.gethostname()
    other = make_directory(aside_path(final, f"{host}-2", dead_process))
    make_directory(aside_path(final, host, dead_process))
    aside = create_aside(final)
    assert set(tmp_path.iterdir()) == {other, aside}
