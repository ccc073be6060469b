"""The Arrow files of a store: their columns, and writing them."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch

from .codec import Codec
from .lossless import join_rows, pack_rows, packed_columns
from .manifest import Shard
from .names import SAMPLE_ID, TOKENS, own_input
from .rows import InputColumn, RowError
from .view_columns import ViewColumns, ViewSpec


class ShardStream:
    """Writes the record batches of a shard to any sink.

    Args:
        sink: a file or an Arrow output stream.
        codec: codec of the base view.
        views: columns of the augmented views.
        inputs: columns of the model inputs that are stored per row.
        lossless: whether each row's codes are compressed to a zstd frame.
    """

    def __init__(
        self,
        sink: Any,
        codec: Codec,
        views: ViewColumns,
        inputs: Mapping[str, InputColumn],
        lossless: bool = False,
    ):
        self.inputs, self.rows = input_columns(inputs, views.spec), 0
        self.packed = packed_columns({**codec.columns, **views.columns}, lossless)
        self.is_text = codec.layout.is_token
        self._schema = shard_features(codec, views, inputs, lossless).arrow_schema
        self._writer = pa.ipc.new_stream(sink, self._schema)

    def write(self, first_row: int, codes: Mapping[str, torch.Tensor], inputs: Mapping[str, Any]) -> None:
        """Appends a batch of consecutive rows.

        Args:
            first_row: number of the first one.
            codes: codes by column, `(B, length)` each; of texts `(N, length)`, those of all tokens.
            inputs: model inputs by column, those of `inputs`.

        Raises:
            RowError: if a model input has another shape or dtype than its column.

        Shapes: B rows, N tokens of texts.
        """
        arrays = {}
        for name, value in codes.items():
            array = value.cpu().contiguous().numpy()
            if self.is_text:
                arrays[name] = self._join(name, array, inputs[TOKENS].cpu().numpy())
            else:
                arrays[name] = self._pack(name, array) if name in self.packed else _fixed_size_list(array)
            rows = len(arrays[name])
        for name, column in self.inputs.items():
            value = inputs[name]
            if column.is_list:
                arrays[name] = pa.array(value, self._schema.field(name).type)
                continue
            array = stored_rows(name, column, value, first_row)
            arrays[name] = pa.array(array.reshape(-1)) if column.shape == () else _fixed_size_list(array)
        arrays[SAMPLE_ID] = pa.array(np.arange(first_row, first_row + rows, dtype=np.int64))
        batch = pa.record_batch([arrays[name] for name in self._schema.names], schema=self._schema)
        self._writer.write_batch(batch)
        self.rows += rows

    def _pack(self, name: str, rows: np.ndarray) -> pa.Array:
        return pack_rows(rows)

    def _join(self, name: str, tokens: np.ndarray, lengths: np.ndarray) -> pa.Array:
        """Rows of the codes of a text's tokens, one after the other."""
        if name in self.packed:
            return pack_rows(np.split(tokens, np.cumsum(lengths)[:-1]))
        return join_rows(tokens, lengths)

    def close(self) -> None:
        """Ends the stream; nothing can be appended any more."""
        self._writer.close()


class ShardWriter(ShardStream, contextlib.AbstractContextManager):
    """Writes one Arrow file of a store; closes it and makes it durable on leaving the context.

    Args:
        path: of the file.
        codec, views, inputs, lossless: see `ShardStream`.
    """

    def __init__(
        self,
        path: Path,
        codec: Codec,
        views: ViewColumns,
        inputs: Mapping[str, InputColumn],
        lossless: bool = False,
    ):
        self.path = path
        self._file = open(path, "wb")
        super().__init__(self._file, codec, views, inputs, lossless)

    def close(self) -> None:
        super().close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __exit__(self, kind, error, traceback):
        if error is None:
            self.close()
        else:
            self._file.close()

    @property
    def bytes(self) -> int:
        """Bytes that were written so far."""
        return self._file.tell()

    def shard(self) -> Shard:
        """Name, rows, size and checksum of the closed file."""
        return Shard(self.path.name, self.rows, self.path.stat().st_size, file_sha256(self.path))


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def stored_rows(name: str, column: InputColumn, value: torch.Tensor, sample: int) -> np.ndarray:
    """Turns a tensor of a collated batch into the array that is stored.

    Args:
        name: of the entry in the batch.
        column: shape and dtype of its rows.
        value: `(B, *column.shape)`.
        sample: number of the first sample, for error messages.

    Returns:
        Array `(B, n)`, n values a row.

    Raises:
        RowError: if the rows have another shape or dtype than the column.

    Shapes: B samples.
    """
    if tuple(value.shape[1:]) != column.shape or str(value.dtype) != f"torch.{column.dtype}":
        raise RowError(
            f"the collator's '{name}' has rows of {tuple(value.shape[1:])} ({value.dtype}) at sample {sample} but of "
            f"{column.shape} (torch.{column.dtype}) before: pad to a fixed size, or use cache='never'."
        )
    return column.to_numpy(value)


def input_columns(inputs: Mapping[str, InputColumn], spec: ViewSpec) -> dict[str, InputColumn]:
    """All columns of model inputs: those of the base view, and those that each augmented view has for itself.

    Args:
        inputs: columns of the base view.
        spec: number of views, and whether each has model inputs for itself.
    """
    views = range(1, spec.count + 1) if spec.own_inputs else ()
    return {**inputs, **{own_input(view, name): column for view in views for name, column in inputs.items()}}


def shard_features(
    codec: Codec, views: ViewColumns, inputs: Mapping[str, InputColumn], lossless: bool
) -> datasets.Features:
    """The columns of a shard as `datasets` describes them.

    Args:
        codec: codec of the base view.
        views: columns of the augmented views.
        inputs: columns of the model inputs that are stored per row.
        lossless: whether each row's codes are compressed to a zstd frame.
    """
    features = {SAMPLE_ID: datasets.Value("int64")}
    codes = {**codec.columns, **views.columns}
    packed = packed_columns(codes, lossless)
    for name, (dtype, length) in codes.items():
        if name in packed or codec.layout.is_token:
            features[name] = datasets.Value("large_binary")
            continue
        features[name] = datasets.List(datasets.Value(str(dtype).removeprefix("torch.")), length=length)
    for name, column in input_columns(inputs, views.spec).items():
        if column.is_list:
            kind = {"str": "large_string", "int": "int64", "float": "float64", "bool": "bool"}[column.dtype]
            features[name] = datasets.Value(kind)
        else:
            length = int(np.prod(column.shape, dtype=np.int64))
            value = datasets.Value(column.stored_as)
            features[name] = value if column.shape == () else datasets.List(value, length=length)
    return datasets.Features(features)


def _fixed_size_list(rows: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
