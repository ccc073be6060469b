"""The stores of a training, and how many bytes another one may take."""

from __future__ import annotations

import errno
import shutil
import uuid
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .names import OWNER
from .small_files import read_small

#: Errors of a file that is missing, a link, or of somebody else.
_NO_OWNER = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM)
#: Share of the free disk that a store may take; the rest is for checkpoints.
DISK_SHARE = 0.9


@dataclass(frozen=True)
class Holding:
    """A store that a training uses.

    Args:
        bytes: size of all its files.
        built: whether this training has built it. Stores that other trainings have built are never deleted.
        cut: frozen blocks.
        is_evaluation: whether it is the store of an evaluation set.
        inherited: whether an earlier training of the same trainer has used it, and this one has not so far.
    """

    bytes: int
    built: bool
    cut: int
    is_evaluation: bool = False
    inherited: bool = False


class Holdings:
    """Counts the stores of a training and their bytes. Every process holds the same.

    Args:
        budget: largest number of bytes that the stores may take together, at any moment; None: no limit.

    Attributes:
        owner: names the training in the stores that it builds, also after it was killed and resumed.
    """

    def __init__(self, budget: int | None):
        self.budget, self.owner = budget, uuid.uuid4().hex
        self._stores: dict[Path, Holding] = {}

    def add(self, path: Path, total_bytes: int, built: bool, cut: int, is_evaluation: bool = False) -> None:
        """Counts a store. A store that this training has built still counts as built when a resume adds it again.

        Args:
            path: directory of the store.
            total_bytes: size of all its files.
            built: whether this training has built it.
            cut: frozen blocks.
            is_evaluation: whether it is the store of an evaluation set.
        """
        self._stores[path] = Holding(total_bytes, built or self.has_built(path), cut, is_evaluation)

    def inherit(self, earlier: Holdings) -> None:
        """Counts the stores of an earlier training of the same trainer, which may be used again."""
        for path, store in earlier._stores.items():
            self._stores.setdefault(path, replace(store, inherited=True))

    def spare(self, in_use: Collection[Path] = ()) -> list[Path]:
        """Inherited stores that this training has not used so far: they make room where it lacks.

        Args:
            in_use: directories of stores that are read or written.
        """
        return [path for path, store in self._stores.items() if store.inherited and path not in in_use]

    def drop(self, path: Path) -> None:
        """Stops counting a store; does nothing if it is not counted."""
        self._stores.pop(path, None)

    def has(self, path: Path) -> bool:
        """Whether a store is counted."""
        return path in self._stores

    def has_built(self, path: Path) -> bool:
        """Whether this training has built a store, so that it may delete it."""
        return path in self._stores and self._stores[path].built

    def outdated(self, cut: int, in_use: Collection[Path] = (), evaluations_only: bool = False) -> list[Path]:
        """Stores that no epoch reads once a cut is reached.

        These are the stores of earlier cuts, as cuts never move back, and stores of the training set at this cut that
        are not in use: a resumed training holds one if its data or settings have changed.

        Args:
            cut: frozen blocks.
            in_use: directories of stores at this cut that are read or written.
            evaluations_only: leave out the stores of the training set.
        """
        outdated = []
        for path, store in self._stores.items():
            if store.is_evaluation:
                unread = store.cut < cut
            else:
                unread = not evaluations_only and store.cut <= cut and path not in in_use
            if unread:
                outdated.append(path)
        return outdated

    def limit(self, without: Collection[Path] = ()) -> int | None:
        """Largest number of bytes that another store may take: what the counted stores leave of the budget.

        Args:
            without: stores that are deleted before the other one is built, so that their bytes do not count.

        Returns:
            Bytes, negative if the stores take more than the budget; None: no limit.
        """
        if self.budget is None:
            return None
        return self.budget - sum(store.bytes for path, store in self._stores.items() if path not in without)

    def state_dict(self) -> list[dict[str, Any]]:
        """The stores as JSON values; a store is named by its directory's name."""
        return [{"name": path.name, **asdict(store)} for path, store in self._stores.items()]

    def load_state_dict(self, state: Iterable[Mapping[str, Any]], directory: Path) -> None:
        """Counts the stores of a checkpoint.

        Args:
            state: what `state_dict` returned, or those of its entries whose stores still exist.
            directory: the feature cache directory that holds the stores.
        """
        for entry in state:
            fields = {name: value for name, value in entry.items() if name != "name"}
            self._stores[directory / entry["name"]] = Holding(**fields)


def note_owner(directory: Path, owner: str) -> None:
    """Notes in the directory of a store which training has built it.

    Raises:
        OSError: if it cannot be written.
    """
    (directory / OWNER).write_text(owner, encoding="ascii")


def is_owned(directory: Path, owner: str) -> bool:
    """Whether a training has built a store."""
    try:
        return read_small(directory / OWNER, len(owner)) == owner.encode()
    except ValueError:  # no owner's name
        return False
    except OSError as error:
        if error.errno in _NO_OWNER:
            return False
        raise


def disk_limit(directory: Path, budget: int | None = None) -> int:
    """Largest number of bytes that a store in a directory may take: a share of the free disk, at most the budget.

    Args:
        directory: the feature cache directory; need not exist yet.
        budget: bytes; None: only the disk limits.
    """
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.is_dir())
    limit = int(DISK_SHARE * shutil.disk_usage(existing).free)
    return limit if budget is None else min(limit, budget)
