"""Rows of codes as zstd frames: smaller on the disk, and every row still read by itself."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import torch

from .names import is_packable

#: Codes have few patterns longer than a value: what zstd takes away is entropy, which its lowest level finds too.
LEVEL = 1
#: Entry of a fingerprint's inputs where rows are packed.
LOSSLESS = {"lossless": "zstd"}


def packed_columns(columns: Mapping[str, tuple[torch.dtype, int]], lossless: bool) -> dict[str, int]:
    """Which columns of codes are packed.

    Args:
        columns: name -> (dtype, length).
        lossless: whether any are.

    Returns:
        Name -> bytes of a row before it is packed.
    """
    if not lossless:
        return {}
    return {name: length for name, (dtype, length) in columns.items() if dtype == torch.uint8 and is_packable(name)}


def pack_rows(rows: np.ndarray) -> pa.LargeBinaryArray:
    """Packs every row for itself, so that random rows are read as before.

    Args:
        rows: uint8 `(B, width)`.

    Returns:
        B zstd frames.
    """
    codec = pa.Codec("zstd", compression_level=LEVEL)
    frames = [codec.compress(pa.py_buffer(row)) for row in np.ascontiguousarray(rows)]
    content = b"".join(memoryview(frame) for frame in frames)
    return _frames(np.cumsum([0, *(frame.size for frame in frames)]), pa.py_buffer(content))


def blank_frames(rows: int, frame_bytes: float) -> pa.LargeBinaryArray:
    """What takes as many bytes as `rows` frames of that size, a mean that need not be whole."""
    ends = np.round(np.arange(rows + 1) * frame_bytes).astype(np.int64)
    return _frames(ends, pa.py_buffer(bytes(int(ends[-1]))))


def largest_frame(width: int) -> int:
    """Most bytes that a frame of `width` bytes can take (`ZSTD_COMPRESSBOUND` of zstd.h)."""
    return width + (width >> 8) + (max(0, (128 << 10) - width) >> 11)


def _frames(ends: np.ndarray, content: pa.Buffer) -> pa.LargeBinaryArray:
    offsets = pa.py_buffer(ends.astype(np.int64))
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(ends) - 1, [None, offsets, content])
