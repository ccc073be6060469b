"""The directories of stores: begun aside, renamed when they are complete, renamed again to be deleted."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .leases import Holder, Lease, changed_within, describe, holders, is_built
from .names import AsideName, aside_path, parse_aside, parse_removed, removed_path


def create_aside(final: Path) -> Path:
    """Makes a directory in which a store is written before it gets its final name.

    Other processes see that this one builds the store. Deletes the directories that dead processes have left behind
    for the same store, and stores that were being deleted.

    Args:
        final: path of the complete store.

    Returns:
        Path of the new directory, beside the final one.

    Raises:
        OSError: if it cannot be made.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    for path, aside in _asides(final):
        if not is_built(path, aside):
            shutil.rmtree(path, ignore_errors=True)
    remove_removed(final.parent)
    path = aside_path(final, socket.gethostname(), os.getpid())
    path.mkdir()
    lease = Lease.take(path)
    if lease is not None:
        _BUILDING[path] = lease
    return path


def claim_aside(final: Path) -> Path | None:
    """Makes a directory as `create_aside` does, unless another process is building the same store.

    Of processes that come at the same moment, at most one gets a directory.

    Args:
        final: path of the complete store.

    Returns:
        The directory; None if another process has one.

    Raises:
        OSError: if it cannot be made.
    """
    if builders(final):
        return None
    path = create_aside(final)
    if builders(final):  # each process looks again when the others can see its own directory
        discard_aside(path)
        time.sleep(random.SystemRandom().random())  # so that they do not meet again
        return None
    return path


def builders(final: Path) -> str:
    """Which other processes are building a store, in words; empty if none is.

    Args:
        final: path of the complete store.
    """
    found: list[Holder | None] = []
    for path, _ in _asides(final):
        living = holders(path, _SILENT_AFTER, own=False)
        if living and changed_within(path, _STUCK_AFTER):
            found += living
    return describe(found)


def rename_aside(path: Path, final: Path) -> None:
    """Gives a directory its final name.

    Raises:
        OSError: if it cannot be renamed.
    """
    os.rename(path, final)
    lease = _BUILDING.pop(path, None)
    if lease is not None:
        lease.moved(final)
        lease.release()


def discard_aside(path: Path) -> None:
    """Deletes a directory that does not become a store."""
    _BUILDING.pop(path, None)
    shutil.rmtree(path, ignore_errors=True)


#: Leases of the directories that this process writes.
_BUILDING: dict[Path, Lease] = {}
#: Seconds after which nobody waits any more for a build that writes nothing, or whose process gives no heartbeat.
_STUCK_AFTER, _SILENT_AFTER = 1800, 300


def _asides(final: Path) -> Iterator[tuple[Path, AsideName]]:
    if not final.parent.is_dir():
        return
    for path in sorted(final.parent.iterdir()):
        aside = parse_aside(path.name)
        if aside is not None and aside.final == final.name:
            yield path, aside


class StoreInUse(OSError):
    """A store is not deleted, because other processes use it."""


def remove_store(path: Path) -> None:
    """Deletes a store. Does nothing if it no longer exists.

    The store is renamed first: if the process is killed at any moment, no part of a store keeps the name of a complete
    one. Files that are left then, or cannot be deleted yet, are deleted with the next store that is deleted or built.
    Processes that hold the files open can still read them (POSIX).

    Raises:
        StoreInUse: if another process holds a lease of it.
        OSError: if the store cannot be renamed; it is unchanged then.
    """
    others = holders(path, own=False)
    if others:
        raise StoreInUse(f"{path} is in use by {describe(others)}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, removed_path(path))
        sync_directory(path.parent)
    remove_removed(path.parent)


def remove_removed(directory: Path) -> None:
    # No process opens a renamed store: unlike a build's directory, any process may delete it.
    for path in directory.iterdir():
        if parse_removed(path.name) is not None:
            shutil.rmtree(path, ignore_errors=True)


def check_writable(directory: Path) -> None:
    """Checks that stores can be written in a directory, or the directory be made; leaves nothing behind.

    A full disk is none that cannot be written: there may be room later, and whoever writes finds out.

    Raises:
        OSError: if they cannot; the message names the remedies.
    """
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return
        raise OSError(
            f"the feature cache directory {directory} is not writable ({error}): set feature_cache_dir to one that is "
            "or use cache='never'."
        ) from error


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
