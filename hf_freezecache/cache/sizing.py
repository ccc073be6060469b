"""How large a store will be, to the byte, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import torch

from .build_plan import BuildPlan
from .codec import make_codec
from .rows import BatchSplit, split_batch
from .store import ShardStream, own_input
from .views import ViewColumns, ViewSpec


def estimate_bytes(plan: BuildPlan, processes: int = 1) -> int:
    """Bytes of the Arrow files that the plan would write; exact where rows have fixed sizes (all but strings).

    Args:
        plan: what would be built.
        processes: that would each write a shard.
    """
    split = split_batch(plan.source.probe(), plan.chain.main_input)
    codec = make_codec(plan.codec, plan.layout)
    return arrow_bytes(codec, plan.views, split, len(plan.source), plan.source.batch_size, processes)


def arrow_bytes(codec: Any, views: ViewSpec, split: BatchSplit, rows: int, batch_size: int, processes: int = 1) -> int:
    """Bytes of Arrow files.

    Args:
        codec: of the base view; need not be fitted.
        views: what is kept of the others.
        split: a few rows' model inputs.
        rows: samples.
        batch_size: samples of a record batch; the last one may be shorter.
        processes: that each write a file.
    """
    columns, described = ViewColumns(views, codec), split.describe()

    def written(sizes: list[int]) -> int:
        sink = pa.MockOutputStream()
        stream = ShardStream(sink, codec, columns, described)
        for size in sizes:
            codes = {
                name: torch.zeros(size, length, dtype=dtype)
                for name, (dtype, length) in {**codec.columns, **columns.columns}.items()
            }
            stream.write(0, codes, _repeated_inputs(split, views, size))
        stream.close()
        return sink.size()

    empty = written([])
    whole, rest = divmod(rows, batch_size)
    total = processes * empty + (whole * (written([batch_size]) - empty) if whole else 0)
    return total + (written([rest]) - empty if rest else 0)


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
