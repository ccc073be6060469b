"""Finding and deleting stores in a feature cache directory: complete ones, and the remains of killed builds."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from .leases import changed_within, describe, holders, is_built
from .names import MANIFEST, SEEN, is_fingerprint, parse_aside, parse_partial, parse_removed, removed_path
from .small_files import LARGEST_JSON, read_small

#: Seconds without a change after which a store that the epochs of a training write counts as given up: a resumed
#: training may continue it.
_GIVEN_UP_AFTER = 3600


@dataclass(frozen=True)
class Removable:
    """A directory that holds a store, or part of one.

    Args:
        path: the directory.
        bytes: size of its files.
        finished: whether it holds a complete store, not the remains of a build or of a deletion.
        running: whether a process writes it or reads it, or may.
        used_by: the processes that hold leases of it, in words; empty if there are none.
    """

    path: Path
    bytes: int
    finished: bool
    running: bool = False
    used_by: str = ""


def find_stores(directory: Path) -> list[Removable]:
    """Lists the stores in a feature cache directory and the remains of builds; ignores everything else.

    Args:
        directory: the feature cache directory.

    Raises:
        NotADirectoryError: if it is not a directory.
    """
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory} is not a directory: name the one that holds the stores.")
    stores = []
    for path in sorted(directory.iterdir()):
        # A link was made by a user on purpose: neither it nor its target is touched.
        if path.is_symlink() or not path.is_dir():
            continue
        aside, removed, used_by = parse_aside(path.name), parse_removed(path.name), describe(holders(path))
        if aside is not None and (aside.final == SEEN or _is_store_name(aside.final)):
            stores.append(Removable(path, _size(path), False, is_built(path, aside), used_by))
        elif removed is not None and is_fingerprint(removed):
            stores.append(Removable(path, _size(path), finished=False))
        elif parse_partial(path.name) is not None:
            running = bool(used_by) or changed_within(path, _GIVEN_UP_AFTER)
            stores.append(Removable(path, _size(path), False, running, used_by))
        elif is_fingerprint(path.name) and _is_store(path):
            stores.append(Removable(path, _size(path), True, bool(used_by), used_by))
    return stores


def has_stores(directory: Path) -> bool:
    """Whether there is a directory with complete stores, damaged or not."""
    return directory.is_dir() and any(is_fingerprint(path.name) and _is_store(path) for path in directory.iterdir())


def remove(stores: list[Removable]) -> int:
    """Deletes the stores that no process uses.

    Args:
        stores: what `find_stores` returned, or a part of it.

    Returns:
        Number of bytes of the deleted files.

    Raises:
        OSError: if a directory cannot be deleted.
    """
    freed = 0
    for store in stores:
        if store.running or holders(store.path):
            continue
        doomed = store.path
        if parse_removed(doomed.name) is None:
            doomed = removed_path(doomed)  # if this process is killed now, no part of a store has a store's name
            os.rename(store.path, doomed)
        shutil.rmtree(doomed)
        freed += store.bytes
    return freed


def _is_store_name(name: str) -> bool:
    return is_fingerprint(name) or parse_partial(name) is not None


def _is_store(path: Path) -> bool:
    """Whether the directory has a manifest with its own name as fingerprint, of any version, damaged or not."""
    try:
        return json.loads(read_small(path / MANIFEST, LARGEST_JSON))["fingerprint"] == path.name
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _size(path: Path) -> int:
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())
