"""Rows of one view as bytes of a fixed size: how a store that is written in any order lays them out."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cache.codec import Codec
from ..cache.names import own_input, view_column
from ..cache.rows import BatchSplit, InputColumn
from ..cache.shards import stored_rows
from ..cache.view_columns import ViewColumns
from .feature_sources import ViewRun


class RowColumns:
    """What a row of one view consists of: columns of fixed size side by side, and lists.

    Args:
        view: its number, 0 for the base view.
        views: the columns of the augmented views.
        codec: of the base view.
        probe: the model inputs of a few rows.
    """

    def __init__(self, view: int, views: ViewColumns, codec: Codec, probe: BatchSplit):
        if view:
            self.codes = {view_column(name, view): column for name, column in views.entries.items()}
        else:
            self.codes = dict(codec.columns)
        described = probe.describe() if view == 0 or views.spec.own_inputs else {}
        self.inputs = {name: column for name, column in described.items() if not column.is_list}
        self.lists = [name for name, column in described.items() if column.is_list]
        self._stored = {name: own_input(view, name) if view else name for name in described}
        widths = [dtype.itemsize * length for dtype, length in self.codes.values()]
        widths += [_input_bytes(column) for column in self.inputs.values()]
        self._ends = np.cumsum(widths).tolist()

    @property
    def width(self) -> int:
        """Bytes of a row."""
        return self._ends[-1]

    def pack(
        self, codes: Mapping[str, torch.Tensor], inputs: Mapping[str, Any], samples: Sequence[int]
    ) -> tuple[np.ndarray, list[str]]:
        """Rows as bytes, uint8 `(B, width)`, and the lists of each as JSON."""
        parts = [codes[name].cpu().contiguous().numpy() for name in self.codes]
        parts += [stored_rows(name, column, inputs[name], samples[0]) for name, column in self.inputs.items()]
        parts = [np.ascontiguousarray(part).view(np.uint8).reshape(len(samples), -1) for part in parts]
        lists = [json.dumps([inputs[name][place] for name in self.lists]) for place in range(len(samples))]
        return np.concatenate(parts, axis=1), lists

    def unpack(self, rows: np.ndarray, lists: Sequence[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Codes and model inputs, by column of the store."""
        parts = iter(np.ascontiguousarray(part) for part in np.split(rows, self._ends[:-1], axis=1))
        codes = {name: torch.from_numpy(next(parts)).view(dtype) for name, (dtype, _) in self.codes.items()}
        inputs: dict[str, Any] = {}
        for name, column in self.inputs.items():
            inputs[self._stored[name]] = column.to_tensor(next(parts).view(column.stored_as))
        values = [json.loads(text) for text in lists]
        return codes, inputs | {self._stored[name]: [row[i] for row in values] for i, name in enumerate(self.lists)}


def pick_rows(view_run: ViewRun, positions: np.ndarray) -> ViewRun:
    """Some rows of a batch."""
    if len(positions) == _batch_rows(view_run):
        return view_run
    places = torch.from_numpy(positions)

    def pick(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value[places.to(value.device)]
        return value if value is None else [value[position] for position in positions]

    columns = {name: pick(value) for name, value in view_run.columns.items()}
    geometry, mask = pick(view_run.geometry), pick(view_run.mask)
    features = pick(view_run.features) if view_run.mask is None else _pick_tokens(view_run, positions)
    return replace(view_run, columns=columns, features=features, geometry=geometry, mask=mask)


def _pick_tokens(view_run: ViewRun, positions: np.ndarray) -> torch.Tensor | None:
    if view_run.features is None or view_run.mask is None:
        return None
    parts = view_run.features.split(view_run.mask.flatten(1).sum(1).tolist())
    return torch.cat([parts[position] for position in positions.tolist()])


def _batch_rows(view_run: ViewRun) -> int | None:
    features = view_run.features if view_run.mask is None else view_run.mask
    values = [features, view_run.geometry, *view_run.columns.values()]
    return next((len(value) for value in values if value is not None), None)


def row_checksum(row: memoryview, lists: str) -> int:
    """Never 0, which marks a row that was not written."""
    return zlib.crc32(row, zlib.crc32(lists.encode())) or 1


def _input_bytes(column: InputColumn) -> int:
    return np.dtype(column.stored_as).itemsize * int(np.prod(column.shape, dtype=np.int64))


def whole_lines(path: Path) -> Iterator[tuple[int, int, str]]:
    """Lines of a file: sample, view and lists. Leaves out what is not whole, as after a process was killed."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            sample, view, values = json.loads(line) if line.endswith("\n") else (None, None, None)
        except (ValueError, TypeError, RecursionError):
            continue
        if type(sample) is int and type(view) is int and isinstance(values, str):
            yield sample, view, values
