"""The disks that hold a training's stores: one that all processes see, or one of each node."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from transformers.utils import logging

from ..cache.cleaning import find_stores
from ..cache.holdings import is_owned
from ..cache.store import FeatureStore, StoreError, remove_store
from ..distributed import Announcer, Group
from ..nodes import NodeGroup

logger = logging.get_logger(__name__)

T = TypeVar("T")


class Disks:
    """One disk of all processes, or one of each node; what is decided is the same for all of them.

    Args:
        group: all processes.
        disk: those that see the same disk as this one.

    Attributes:
        group: those that see the same disk as this one.
    """

    def __init__(self, group: Group, disk: Group):
        self._all, self.group = group, disk

    @property
    def are_many(self) -> bool:
        """Whether each node has a disk of its own, with its share of the rows."""
        return isinstance(self.group, NodeGroup)

    @property
    def node(self) -> int:
        """Number of this process's node."""
        return self.group.node if isinstance(self.group, NodeGroup) else 0

    def on_main(self, step: Callable[[], T]) -> T:
        """Runs a step once on this disk; its result, or its failure, is that of all who see the disk."""
        return self.group.on_main(step)

    def on_all(self, step: Callable[[], T]) -> T:
        """Runs a step of which those who see a disk agree; if it fails on one disk, it fails on all.

        Raises:
            Exception: see `Group.on_all`.
        """
        if not self.are_many:
            return step()
        # Within the node as well: there another process may wait for a value of the one that fails.
        return self._all.on_all(lambda: self.group.on_all(step))

    def all(self, value: bool) -> bool:
        """Whether something holds on all disks; those who see a disk agree on it."""
        return all(self._all.gather(value)) if self.are_many else value

    def any(self, value: bool) -> bool:
        """Whether something holds on some disk; those who see a disk agree on it."""
        return any(self._all.gather(value)) if self.are_many else value

    def most(self, value: int) -> int:
        """The largest value of all disks."""
        return max(self._all.gather(value)) if self.are_many else value

    def least(self, value: int | None) -> int | None:
        """The smallest value of all disks; None is larger than any."""
        if not self.are_many:
            return value
        return min((found for found in self._all.gather(value) if found is not None), default=None)

    def build(
        self, found: FeatureStore | None, make: Callable[[], FeatureStore], announcer: Announcer
    ) -> FeatureStore:
        """The store on this disk: the one that was found there, or one that is made. All disks have one then, or none.

        Args:
            found: None if there is none.
            make: makes it.
            announcer: tells what is left behind.

        Raises:
            Exception: on every process, what `make` has raised on one disk.
        """
        made: list[FeatureStore] = []
        try:
            self.on_all(lambda: made.append(make()) if found is None else None)
        except Exception:
            if made:  # another node has failed, and nobody will read it
                try:
                    self.on_main(partial(remove_store, made[0].path))
                except OSError as error:
                    announcer.failure("The feature store of a node could not be deleted, though others failed", error)
            raise
        return made[0] if found is None else found


def owned_stores(directory: Path, owner: str) -> list[dict[str, Any]]:
    """The stores of a directory that a training has built, as `Holdings.state_dict` would name them.

    Args:
        directory: the feature cache directory.
        owner: names the training.
    """
    return list(_owned(directory, owner)) if directory.is_dir() else []


def _owned(directory: Path, owner: str) -> Iterator[dict[str, Any]]:
    for entry in find_stores(directory):
        if entry.finished and is_owned(entry.path, owner):
            try:
                cut = FeatureStore.open(entry.path).manifest.cut
            except (StoreError, OSError) as error:  # it is not used then, and built again
                Announcer.survived(logger, f"The feature store {entry.path} cannot be opened", error)
                continue
            yield {"name": entry.path.name, "bytes": entry.bytes, "built": True, "cut": cut}
