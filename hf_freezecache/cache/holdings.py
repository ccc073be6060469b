"""The stores that a training has, and the bytes that it may still take for others."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: The part of the free disk that stores may take: checkpoints need some too.
DISK_SHARE = 0.9


@dataclass(frozen=True)
class Holding:
    """A store of this training.

    Args:
        bytes: of all its files.
        built: whether this training has built it: what others have built is not removed.
        evaluation_cut: frozen blocks, if it is one of an evaluation set; None for the training's own.
    """

    bytes: int
    built: bool
    evaluation_cut: int | None = None


class Holdings:
    """Keeps count of a training's stores. The same on every process.

    Args:
        budget: most bytes that they may take together, at any moment; None: no limit.
    """

    def __init__(self, budget: int | None):
        self.budget = budget
        self._stores: dict[Path, Holding] = {}

    def add(self, path: Path, total_bytes: int, built: bool, evaluation_cut: int | None = None) -> None:
        """Takes a store in. One that this training has built stays so when it is found again after a resume."""
        self._stores[path] = Holding(total_bytes, built or self.has_built(path), evaluation_cut)

    def drop(self, path: Path) -> None:
        """Forgets a store."""
        self._stores.pop(path, None)

    def has(self, path: Path) -> bool:
        """Whether a store is counted."""
        return path in self._stores

    def has_built(self, path: Path) -> bool:
        """Whether this training has built a store, and may so remove it."""
        return path in self._stores and self._stores[path].built

    def evaluations_before(self, cut: int) -> list[Path]:
        """Stores of evaluation sets at earlier cuts: nothing will read them again."""
        found = ((path, held.evaluation_cut) for path, held in self._stores.items())
        return [path for path, own in found if own is not None and own < cut]

    def room(self, without: Path | None = None) -> int | None:
        """Bytes that another store may take; None: no limit.

        Args:
            without: a store that goes before.
        """
        if self.budget is None:
            return None
        return self.budget - sum(held.bytes for path, held in self._stores.items() if path != without)

    def state(self) -> list[dict[str, Any]]:
        """The stores as JSON values."""
        return [
            {"name": path.name, "bytes": held.bytes, "built": held.built, "evaluation_cut": held.evaluation_cut}
            for path, held in self._stores.items()
        ]

    def load(self, state: Iterable[Mapping[str, Any]], directory: Path) -> None:
        """Continues from `state()`, or from the part of it that is still there."""
        for entry in state:
            self._stores[directory / entry["name"]] = Holding(entry["bytes"], entry["built"], entry["evaluation_cut"])


def disk_limit(directory: Path, budget: int | None = None) -> int:
    """Bytes that a store in a directory may take: the budget, and not more than a share of the free disk.

    Args:
        directory: where stores will lie; need not exist yet.
        budget: bytes; None: the disk alone limits.
    """
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.is_dir())
    room = int(DISK_SHARE * shutil.disk_usage(existing).free)
    return room if budget is None else min(room, budget)
