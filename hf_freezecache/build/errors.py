"""Why a store is not built. All of them survive the way to another process."""

from __future__ import annotations

from typing import Any

from ..cache.rows import RowError


class BuildFailed(OSError):
    """A store could not be written (full disk, missing permission). Training can go on without it."""


class NotWritable(BuildFailed):
    """Nothing can be written to the directory of the stores. Complete stores in it are used all the same."""


class OverLimit(ValueError):
    """A store would take more bytes than it may; nothing was written.

    Args:
        needed: bytes of all its files.
        limit: bytes that they may take.
    """

    def __init__(self, needed: int, limit: int):
        super().__init__(f"the store would take {needed:,} bytes, and only {limit:,} are left")
        self.needed, self.limit = needed, limit

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.needed, self.limit)


class GeometryMisfit(ValueError):
    """A view's geometry cannot be stored as the spec says; the message is the reason, as the end of a sentence.

    Args:
        reason: the message.
        for_all_kinds: whether no other kind of geometry would do either.
    """

    def __init__(self, reason: str, for_all_kinds: bool = False):
        super().__init__(reason)
        self.for_all_kinds = for_all_kinds


class OneWidthError(RowError):
    """Texts are padded to the longest of a batch, and features at a cut include padding: they have no common size."""
