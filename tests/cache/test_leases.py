"""Leases: who uses a store, whether he lives, and what is not deleted because of it."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
from support.builds import build
from support.helpers import tiny_vit

from hf_freezecache import FeatureStore
from hf_freezecache.cache.cleaning import find_stores, remove
from hf_freezecache.cache.directories import StoreInUse, builders, claim_aside, create_aside, remove_store
from hf_freezecache.cache.leases import STALE_AFTER, Holder, Lease, describe, holders
from hf_freezecache.cache.names import aside_path


@pytest.fixture
def store(tmp_path):
    return build(tiny_vit().eval(), tmp_path)


@pytest.fixture
def neighbour():
    """Another process; killed in the end."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def holder_of(process: int) -> Holder:
    with open(f"/proc/{process}/stat") as file:
        started = int(file.read().rpartition(")")[2].split()[19])
    return replace(Holder.this(), process=process, started=started)


def write_lease(directory, holder, age=0.0):
    file = directory / ".lease-0123456789ab"
    file.write_text(json.dumps(asdict(holder)))
    os.utime(file, (time.time() - age,) * 2)
    return file


def test_lease_names_this_process_until_it_is_released(tmp_path):
    lease = Lease.take(tmp_path)
    assert holders(tmp_path) == [Holder.this()] and holders(tmp_path, own=False) == []
    assert str(Holder.this()) == describe(holders(tmp_path))
    lease.release()
    assert holders(tmp_path) == [] and list(tmp_path.iterdir()) == []


def test_heartbeat_renews_the_lease(tmp_path):
    lease = Lease.take(tmp_path)
    os.utime(lease.file, (0, 0))
    lease.renew()
    assert time.time() - lease.file.stat().st_mtime < 60


def test_fork_neither_holds_nor_releases_a_lease(tmp_path):
    lease = Lease.take(tmp_path)
    process = os.fork()
    if process == 0:
        lease.release()
        os._exit(0)
    os.waitpid(process, 0)
    assert holders(tmp_path) == [Holder.this()]


def test_process_that_is_seen_lives_as_long_as_it_runs_whatever_its_heartbeat(neighbour, tmp_path):
    write_lease(tmp_path, holder_of(neighbour.pid), age=10 * STALE_AFTER)
    assert holders(tmp_path, own=False) == [holder_of(neighbour.pid)]
    neighbour.send_signal(signal.SIGKILL)
    neighbour.wait()
    assert holders(tmp_path) == []


def test_number_that_was_used_again_is_another_process(neighbour, tmp_path):
    write_lease(tmp_path, replace(holder_of(neighbour.pid), started=1))
    assert holders(tmp_path) == []


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"boot": "before"}, {"namespace": "pid:[1]"}])
def test_process_that_is_not_seen_lives_as_long_as_its_heart_beats(other, tmp_path):
    """The same number in another container is not that process."""
    holder = replace(Holder.this(), **other)
    write_lease(tmp_path, holder, age=STALE_AFTER - 60)
    assert holders(tmp_path, own=False) == [holder]
    write_lease(tmp_path, holder, age=STALE_AFTER + 60)
    assert holders(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": 1}', b"\xff", b"[" * 100_000])
def test_lease_that_cannot_be_read_counts_while_it_is_fresh(content, tmp_path):
    (tmp_path / ".lease-a").write_bytes(content)
    assert holders(tmp_path) == [None] and describe(holders(tmp_path)) == "another process"
    os.utime(tmp_path / ".lease-a", (0, 0))
    assert holders(tmp_path) == []


def test_leases_of_dead_processes_are_deleted_with_the_next_one(tmp_path):
    dead = write_lease(tmp_path, replace(Holder.this(), started=1))
    lease = Lease.take(tmp_path)
    assert not dead.exists() and lease.file.exists()


def test_directory_that_cannot_be_written_has_no_lease(tmp_path):
    assert Lease.take(tmp_path / "missing") is None and holders(tmp_path / "missing") == []


# Stores


def test_held_store_is_read_verified_and_opened_as_any_other(store):
    store.hold()
    assert store.verify() and FeatureStore.open(store.path).verify()
    assert len([name for name in os.listdir(store.path) if name.startswith(".lease-")]) == 1
    store.release()
    assert not any(name.startswith(".lease-") for name in os.listdir(store.path))


def test_store_that_another_process_uses_is_not_deleted(store, neighbour):
    write_lease(store.path, holder_of(neighbour.pid))
    with pytest.raises(StoreInUse, match=f"in use by process {neighbour.pid} on"):
        remove_store(store.path)
    (found,) = find_stores(store.path.parent)
    assert found.finished and found.running and str(neighbour.pid) in found.used_by
    assert remove([found]) == 0 and remove([replace(found, running=False)]) == 0 and store.verify()
    neighbour.kill()
    neighbour.wait()
    (found,) = find_stores(store.path.parent)
    assert not found.running and remove([found]) == found.bytes
    assert list(store.path.parent.iterdir()) == []


def test_own_lease_does_not_keep_a_training_from_deleting_its_store(store):
    store.hold()
    (found,) = find_stores(store.path.parent)
    assert found.running
    remove_store(store.path)
    assert not store.path.exists()
    store.release()


# Builds


def test_build_of_another_process_is_seen_and_kept(neighbour, tmp_path):
    """Though its directory names a process of this machine that does not exist: it runs in another container."""
    aside = aside_path(tmp_path / ("a" * 32), Holder.this().host, 2**22 + 7)
    aside.mkdir()
    elsewhere = replace(Holder.this(), namespace="pid:[1]")
    write_lease(aside, elsewhere)
    assert builders(tmp_path / ("a" * 32)) == str(elsewhere)
    assert claim_aside(tmp_path / ("a" * 32)) is None
    create_aside(tmp_path / ("a" * 32))
    assert aside.exists()
    write_lease(aside, elsewhere, age=STALE_AFTER + 60)
    assert builders(tmp_path / ("a" * 32)) == ""
    create_aside(tmp_path / ("a" * 32))
    assert not aside.exists()


def test_build_that_writes_nothing_is_not_waited_for(neighbour, tmp_path):
    final = tmp_path / ("a" * 32)
    aside = aside_path(final, "elsewhere", 1)
    aside.mkdir()
    write_lease(aside, holder_of(neighbour.pid))
    assert builders(final)
    os.utime(aside, (0, 0))
    assert builders(final) == "" and aside.exists()
