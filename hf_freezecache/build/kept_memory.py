"""Keeping memory from batch to batch while a store is built."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from typing import Any

# Of malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
#: What glibc has after large blocks were freed a few times: it raises its own thresholds that far and no further.
_SETTLED = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
_NEVER = 2**31 - 1


@contextlib.contextmanager
def memory_kept() -> Iterator[None]:
    """Inside, what is freed stays with the process; on leaving, it is given back to the system.

    Batches and the outputs of blocks are blocks of megabytes. glibc returns these to the system as soon as they are
    freed, and gets them back page by page for the next batch, which makes a forward pass up to a quarter slower. Other
    C libraries, and thresholds that a user has set (`MALLOC_*`, `GLIBC_TUNABLES`), are left alone.
    """
    libc = None if _is_set_by_user() else _glibc()
    if libc is None:
        yield
        return
    for threshold in _SETTLED:
        libc.mallopt(threshold, _NEVER)
    try:
        yield
    finally:
        for threshold, value in _SETTLED.items():
            libc.mallopt(threshold, value)
        libc.malloc_trim(0)


def _is_set_by_user() -> bool:
    return any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")


@functools.cache
def _glibc() -> Any:
    """The C library, where it is glibc; else None."""
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version, libc.mallopt, libc.malloc_trim  # noqa: B018  # looked up: AttributeError without
    except (OSError, TypeError, AttributeError):  # no such library: musl, macOS, Windows
        return None
    return libc
