"""Which codec fits into what is left of the budget and the disk, and which store has to go for it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ..build.sizing import estimate_bytes
from ..build.store_spec import StoreSpec
from ..cache.codec import make_codec
from ..cache.holdings import Holdings, disk_limit
from ..cache.store import FeatureStore
from ..config import FreezeCacheConfig
from ..distributed import Group
from ..units import parse_bytes, show_bytes

#: Codecs that are taken, in this order, where the wanted one does not fit: none that is known to cost accuracy.
_COARSER = ("fp16", "int8", "int4", "int3")


class StoreBudget:
    """The bytes of one training's stores.

    Args:
        config: the user's settings.
        group: the processes.
        cache_dir: where stores lie.
    """

    def __init__(self, config: FreezeCacheConfig, group: Group, cache_dir: Path):
        self.config, self.group, self.cache_dir = config, group, cache_dir
        budget = config.cache_budget
        self.holdings = Holdings(None if budget is None else parse_bytes(budget))

    def codecs(self, wanted: str, spec: StoreSpec) -> Iterator[str]:
        """The wanted codec, then those that are smaller."""
        yield wanted
        row_bytes = make_codec(wanted, spec.layout).row_bytes
        for codec in _COARSER:
            smaller = make_codec(codec, spec.layout).row_bytes
            if smaller < row_bytes:
                row_bytes = smaller
                yield codec

    def attempts(
        self, spec: StoreSpec, current: FeatureStore | None, copies: int
    ) -> Iterator[tuple[int | None, bool]]:
        """The ways to build a spec that may fit.

        Args:
            spec: what would be built.
            current: the store of the cut before.
            copies: how often its bytes lie on the disk until it is finished.

        Yields:
            The most bytes that its files may take, None where nothing limits them; and whether `current` has to go
            before, which is tried last.
        """
        needed = copies * self.needed(spec)
        room = self.room()
        if room is None or needed <= room:
            yield room, False
        if current is not None and self.holdings.has(current.path):
            room = self.room(without=current.path)
            if room is not None and needed <= room:
                yield room, True

    def needed(self, spec: StoreSpec) -> int:
        """Bytes of the Arrow files."""
        return self.group.on_main(partial(estimate_bytes, spec, self.group.size))

    def room(self, without: Path | None = None) -> int | None:
        """Bytes for another store: of the budget, and of the free disk unless a store is wanted in any case.

        Args:
            without: a store that goes before. Its bytes on the disk do not count: processes may still read it.
        """
        room = self.holdings.limit(without)
        if self.config.cache == "always":
            return room
        return self.group.on_main(partial(disk_limit, self.cache_dir, room))

    def holds(self, store: FeatureStore, current: FeatureStore | None) -> bool:
        """Whether a store that exists may be used beside what is there, `current` excepted."""
        room = self.holdings.limit(None if current is None else current.path)
        return room is None or self.holdings.has(store.path) or store.total_bytes <= room

    def too_large(self, spec: StoreSpec, needed: int | None = None) -> str:
        """Why a spec is not built, as the end of a sentence.

        Args:
            spec: what would be built.
            needed: bytes of all its files, where they are known.
        """
        needed = self.needed(spec) if needed is None else needed
        left, room = self.holdings.limit(), self.room()
        place = "the budget" if left is not None and room == left else f"the disk of {self.cache_dir}"
        room = show_bytes(max(room or 0, 0))
        return f"it needs {show_bytes(needed)} even as {spec.codec}, and {room} are left of {place}"
