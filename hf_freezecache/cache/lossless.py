"""Rows of codes compressed without loss: one zstd frame per row, so that a row is still read by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch

from .names import is_packable

#: Codes have few patterns longer than a value. zstd removes their entropy, and its lowest level does that as well.
LEVEL = 1
#: Entry that packed rows add to a fingerprint's inputs.
LOSSLESS = {"lossless": "zstd"}


def packed_columns(columns: Mapping[str, tuple[torch.dtype, int]], lossless: bool) -> dict[str, int]:
    """The columns whose rows are packed.

    Args:
        columns: name -> (dtype, length).
        lossless: whether the store packs rows at all.

    Returns:
        Name -> bytes of an unpacked row.
    """
    if not lossless:
        return {}
    return {name: length for name, (dtype, length) in columns.items() if dtype == torch.uint8 and is_packable(name)}


def join_rows(tokens: np.ndarray, lengths: np.ndarray) -> pa.LargeBinaryArray:
    """Rows of several tokens each.

    Args:
        tokens: `(N, width)`, the codes of all tokens.
        lengths: int64 `(B,)`, how many of them each row has.

    Returns:
        B rows of bytes.

    Shapes: B rows, N tokens.
    """
    ends = np.concatenate([[0], np.cumsum(lengths)]) * (tokens.shape[1] * tokens.itemsize)
    return _frames(ends.astype(np.int64), pa.py_buffer(np.ascontiguousarray(tokens)))


def pack_rows(rows: np.ndarray | Sequence[np.ndarray]) -> pa.LargeBinaryArray:
    """Compresses each row to a zstd frame of its own, so that rows can still be read in any order.

    Args:
        rows: uint8 `(B, width)`, or B arrays.

    Returns:
        B zstd frames.

    Shapes: B rows, width bytes of an unpacked row.
    """
    codec = pa.Codec("zstd", compression_level=LEVEL)
    frames = [codec.compress(pa.py_buffer(np.ascontiguousarray(row))) for row in rows]
    content = b"".join(memoryview(frame) for frame in frames)
    return _frames(np.cumsum([0, *(frame.size for frame in frames)]), pa.py_buffer(content))


def blank_frames(rows: int, frame_bytes: float) -> pa.LargeBinaryArray:
    """Frames without content that take as many bytes as real ones, to compute the size of a store.

    Args:
        rows: number of frames.
        frame_bytes: mean size of a frame, need not be whole.
    """
    ends = np.round(np.arange(rows + 1) * frame_bytes).astype(np.int64)
    return _frames(ends, pa.py_buffer(bytes(int(ends[-1]))))


def largest_frame(width: int) -> int:
    """Largest possible size, in bytes, of the frame of a row of `width` bytes (`ZSTD_COMPRESSBOUND` of zstd.h)."""
    return width + (width >> 8) + (max(0, (128 << 10) - width) >> 11)


def _frames(ends: np.ndarray, content: pa.Buffer) -> pa.LargeBinaryArray:
    offsets = pa.py_buffer(ends.astype(np.int64))
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(ends) - 1, [None, offsets, content])
