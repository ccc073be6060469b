"""Which codec fits into the bytes that are left, and whether outdated stores have to be deleted first."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

from ..build.sizing import estimate_bytes
from ..build.store_spec import StoreSpec
from ..cache.codec import make_codec
from ..cache.holdings import Holdings, disk_limit
from ..cache.names import partial_path
from ..cache.store import FeatureStore
from ..config import FreezeCacheConfig
from ..distributed import Group
from ..units import parse_bytes, show_bytes
from .disks import Disks

#: Codecs that are tried, in this order, where the configured one does not fit: none that is known to cost accuracy.
_COARSER = ("fp16", "int8", "int4", "int3")


class StoreBudget:
    """The bytes of one training's stores.

    Args:
        config: the user's settings.
        group: the processes.
        cache_dir: the directory of the stores.
        disks: on which the stores are; None: on one. Of several, the fullest decides.
    """

    def __init__(self, config: FreezeCacheConfig, group: Group, cache_dir: Path, disks: Disks | None = None):
        self.config, self.group, self.cache_dir = config, group, cache_dir
        self.disks = Disks(group, group) if disks is None else disks
        budget = config.cache_budget
        self.holdings = Holdings(None if budget is None else parse_bytes(budget))

    def codecs(self, codec: str, spec: StoreSpec) -> Iterator[str]:
        """The configured codec, then coarser ones, each with smaller rows than the one before."""
        yield codec
        row_bytes = make_codec(codec, spec.layout).row_bytes
        for coarser in _COARSER:
            coarser_bytes = make_codec(coarser, spec.layout).row_bytes
            if coarser_bytes < row_bytes:
                row_bytes = coarser_bytes
                yield coarser

    def attempts(self, spec: StoreSpec, copies: int = 1) -> Iterator[tuple[int | None, bool]]:
        """The ways to build a store that may fit.

        Args:
            spec: what would be built.
            copies: how many times its bytes are on the disk until it is finished.

        Yields:
            The most bytes that its files may take, None where nothing limits them; and whether the outdated stores
            have to be deleted first, which is tried last.
        """
        needed = copies * self.needed(spec)
        limit = self.limit()
        if limit is None or needed <= limit:
            yield limit, False
        outdated = self.outdated(spec)
        if self.disks.any(bool(outdated)):
            limit = self.limit(without=outdated)
            if limit is not None and needed <= limit:
                yield limit, True

    def outdated(self, spec: StoreSpec) -> list[Path]:
        """Stores that no epoch reads once this one is complete, and those that earlier trainings have left."""
        in_use = (spec.path, partial_path(spec.path))
        return list(dict.fromkeys([*self.holdings.outdated(spec.cut, in_use), *self.holdings.spare(in_use)]))

    def needed(self, spec: StoreSpec) -> int:
        """Bytes of the Arrow files."""
        return self.disks.most(self.disks.on_main(partial(estimate_bytes, spec, self.disks.group.size)))

    def limit(self, without: Collection[Path] = ()) -> int | None:
        """Bytes that another store may take: of the budget, and of the free disk unless `cache='always'`.

        Args:
            without: stores that are deleted before. Their bytes on the disk still count: processes may read them.

        Returns:
            Bytes; None: no limit.
        """
        limit = self.holdings.limit(without)
        if self.config.cache != "always":
            limit = self.disks.on_main(partial(disk_limit, self.cache_dir, limit))
        return self.disks.least(limit)

    def room(self) -> int:
        """Bytes that a temporary file of this process may take beside the stores: of the budget and of the disk."""
        return max(0, disk_limit(self.cache_dir, self.holdings.limit())) // self.disks.group.size

    def holds(self, store: FeatureStore) -> bool:
        """Whether a store that exists may be used beside the others, outdated ones not counted."""
        limit = self.limit_of(store.manifest.cut, store.path)
        return limit is None or self.holdings.has(store.path) or store.total_bytes <= limit

    def limit_of(self, cut: int, path: Path) -> int | None:
        """Bytes that a store which exists may take; None: the budget does not limit it.

        Args:
            cut: of the store.
            path: its directory.
        """
        return self.holdings.limit([*self.holdings.outdated(cut, in_use=(path,)), *self.holdings.spare()])

    def too_large(self, spec: StoreSpec, needed: int | None = None) -> str:
        """Why a store is not built, as the end of a sentence.

        Args:
            spec: what would be built.
            needed: bytes of all its files, where they are known.
        """
        needed = self.needed(spec) if needed is None else needed
        budget, limit = self.disks.least(self.holdings.limit()), self.limit()
        place = "`cache_budget`" if budget is not None and limit == budget else f"the disk of {self.cache_dir}"
        left = show_bytes(max(limit or 0, 0))
        return f"it needs {show_bytes(needed)} even with codec `{spec.codec}`, but only {left} of {place} are left"
