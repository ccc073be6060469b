"""How large a store will be, to the byte, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..cache.codec import Codec, make_codec
from ..cache.lossless import blank_frames, largest_frame
from ..cache.names import TOKENS, own_input
from ..cache.rows import BatchSplit
from ..cache.shards import ShardStream
from ..cache.view_columns import ViewColumns, ViewSpec
from .store_spec import StoreSpec


def estimate_bytes(spec: StoreSpec, processes: int = 1) -> int:
    """Bytes of the Arrow files that the spec would write; exact where rows have fixed sizes (all but strings).

    Where rows are packed, these are the most bytes that they can take.

    Args:
        spec: what would be built.
        processes: that would each write a shard.
    """
    split = spec.split(spec.source.probe())
    return spec_bytes(spec, make_codec(spec.codec, spec.layout), split, processes)


def spec_bytes(
    spec: StoreSpec,
    codec: Codec,
    split: BatchSplit,
    processes: int = 1,
    views: ViewSpec | None = None,
    frame_bytes: Mapping[str, float] | None = None,
) -> int:
    """Bytes of the Arrow files that the spec would write.

    Args:
        spec: what would be built.
        codec: of the base view; need not be fitted.
        split: a few rows' model inputs.
        processes: that would each write a shard.
        views: in place of the spec's.
        frame_bytes: mean size of a packed row, by column; the largest possible ones if None.
    """
    views = spec.views if views is None else views
    rows, batch_size = len(spec.source), spec.source.batch_size
    tokens = spec.tokens if spec.layout.is_token else None
    return arrow_bytes(codec, views, split, rows, batch_size, processes, spec.lossless, frame_bytes, tokens)


def arrow_bytes(
    codec: Codec,
    views: ViewSpec,
    split: BatchSplit,
    rows: int,
    batch_size: int,
    processes: int = 1,
    lossless: bool = False,
    frame_bytes: Mapping[str, float] | None = None,
    tokens: float | None = None,
) -> int:
    """Bytes of Arrow files.

    Args:
        codec: of the base view; need not be fitted.
        views: what is kept of the others.
        split: a few rows' model inputs.
        rows: samples.
        batch_size: samples of a record batch; the last one may be shorter.
        processes: that each write a file.
        lossless: whether every row's codes are packed.
        frame_bytes: mean size of a packed row, by column; the largest possible ones if None.
        tokens: mean number of tokens of a sample, for texts that are stored without padding.
    """
    columns, described = ViewColumns(views, codec), split.describe()

    def written(sizes: list[int]) -> int:
        sink = pa.MockOutputStream()
        stream = _BlankStream(sink, codec, columns, described, lossless, frame_bytes)
        for size in sizes:
            inputs, features = _repeated_inputs(split, views, size), size
            if tokens is not None:
                ends = (torch.arange(size + 1) * tokens).round().to(torch.int64)
                inputs, features = {**inputs, TOKENS: ends.diff()}, int(ends[-1])
            codes = {
                name: torch.zeros(features, length, dtype=dtype)
                for name, (dtype, length) in {**codec.columns, **columns.columns}.items()
            }
            stream.write(0, codes, inputs)
        stream.close()
        return sink.size()

    empty = written([])
    whole, rest = divmod(rows, batch_size)
    total = processes * empty + (whole * (written([batch_size]) - empty) if whole else 0)
    return total + (written([rest]) - empty if rest else 0)


class _BlankStream(ShardStream):
    """Where rows are packed, nothing stands for them but their size."""

    def __init__(
        self,
        sink: Any,
        codec: Codec,
        views: ViewColumns,
        inputs: Mapping[str, Any],
        lossless: bool,
        frame_bytes: Mapping[str, float] | None,
    ):
        super().__init__(sink, codec, views, inputs, lossless)
        largest = {name: largest_frame(width) for name, width in self.packed.items()}
        self._frame_bytes, self._is_measured = largest if frame_bytes is None else frame_bytes, frame_bytes is not None

    def _pack(self, name: str, rows: np.ndarray) -> pa.Array:
        return blank_frames(len(rows), self._frame_bytes[name])

    def _join(self, name: str, tokens: np.ndarray, lengths: np.ndarray) -> pa.Array:
        if name not in self.packed:
            return super()._join(name, tokens, lengths)
        if self._is_measured:
            return blank_frames(len(lengths), self._frame_bytes[name])
        return blank_frames(len(lengths), largest_frame(-(-tokens.nbytes // max(1, len(lengths)))))


def _repeated_inputs(split: BatchSplit, views: ViewSpec, rows: int) -> Mapping[str, Any]:
    """The first row's model inputs, `rows` times, for every view that has its own."""
    inputs = {}
    for name, value in split.columns.items():
        row = value[:1]
        repeated = row.expand(rows, *row.shape[1:]) if isinstance(row, torch.Tensor) else list(row) * rows
        inputs[name] = repeated
        if views.own_inputs:
            inputs |= {own_input(view, name): repeated for view in range(1, views.count + 1)}
    return inputs
