"""Reading rows of a store's columns from its files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from .arrow_stream import PlacedBatch, buffer_places
from .held_files import Readable
from .manifest import BEST_PACKED, REBUILD, StoreError

#: Bytes of a row, and of all rows of a column, up to which the column is read once and kept: labels, geometry.
_SMALL_ROW, _SMALL_COLUMN = 64, 1 << 24


class StoredColumn(ABC):
    """One column over all record batches of a store. A row is read by itself, whatever is beside it.

    Args:
        batches: the record batches, in the order of their rows.
        schema: theirs.
        name: of the column.
        where: names the store in error messages.

    Raises:
        StoreError: if the column has nulls or fewer values than rows.
    """

    def __init__(self, batches: Sequence[PlacedBatch], schema: pa.Schema, name: str, where: object):
        nodes, buffers = buffer_places(schema)[name]
        batches = [batch for batch in batches if batch.layout.rows]
        self.type, self.label = schema.field(name).type, f"column {name!r} of {where}"
        self._files = list(dict.fromkeys(batch.file for batch in batches))
        numbers = {file: number for number, file in enumerate(self._files)}
        self._file_of_batch = np.array([numbers[batch.file] for batch in batches], np.int64)
        self._rows = np.array([batch.layout.rows for batch in batches], np.int64)
        self._ends = np.cumsum(self._rows)
        for layout in {id(batch.layout): batch.layout for batch in batches}.values():
            if len(layout.nulls) < nodes.stop or len(layout.buffers) < buffers.stop or any(layout.nulls[nodes]):
                raise StoreError(f"{self.label} has nulls, or lacks a part: {REBUILD}.")
            sizes = [size for _, size in layout.buffers[buffers]]
            if any(size < least for size, least in zip(sizes, self._least_sizes(layout.rows), strict=True)):
                raise StoreError(f"{self.label} has fewer values than rows: {REBUILD}.")
        # Offset in the file and size of each buffer, `(batches, buffers, 2)`.
        places = np.array([batch.layout.buffers[buffers] for batch in batches], np.int64).reshape(len(batches), -1, 2)
        self._starts = places[:, :, 0] + np.array([batch.start for batch in batches], np.int64)[:, None]
        self._sizes = places[:, :, 1]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @abstractmethod
    def take(self, rows: np.ndarray, into: np.ndarray | None = None) -> Any:
        """Reads rows.

        Args:
            rows: int64 row numbers `(B,)`, in any order.
            into: where the rows are put, `(B, width)`; None: into new memory. Columns of text have no use for it.

        Returns:
            An array `(B, width)`, or a list of B values.

        Raises:
            IndexError: if a row does not exist.
            StoreError: if a row is damaged or cannot be read; the message names the row, or the file.

        Shapes: B rows.
        """

    @abstractmethod
    def _least_sizes(self, rows: int) -> tuple[int, ...]:
        """Bytes that the buffers of a record batch have at least."""

    def _file(self, batch: int) -> Readable:
        return self._files[self._file_of_batch[batch]]

    def _locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Record batch of each row, and the row's number there."""
        if len(rows) and not (0 <= rows.min() and rows.max() < len(self)):
            raise IndexError(f"rows {rows.min()}..{rows.max()} were requested; there are {len(self)}.")
        batches = np.searchsorted(self._ends, rows, "right")
        return batches, rows - (self._ends - self._rows)[batches] if len(rows) else rows


class FixedColumn(StoredColumn):
    """Numbers, or lists of equal length.

    Attributes:
        width: number of values of a row.
        dtype: NumPy type of a value.
    """

    def __init__(self, batches: Sequence[PlacedBatch], schema: pa.Schema, name: str, where: object):
        kind = schema.field(name).type
        is_list = pa.types.is_fixed_size_list(kind)
        self.width = kind.list_size if is_list else 1
        self.dtype = np.dtype((kind.value_type if is_list else kind).to_pandas_dtype())
        self._row_bytes = self.width * self.dtype.itemsize
        super().__init__(batches, schema, name, where)
        self._in_memory: np.ndarray | None = None

    def take(self, rows: np.ndarray, into: np.ndarray | None = None) -> np.ndarray:
        batches, places = self._locate(rows)
        values = np.empty((len(rows), self.width), self.dtype) if into is None else into
        if self._row_bytes <= _SMALL_ROW and len(self) * self._row_bytes <= _SMALL_COLUMN:
            if self._in_memory is None:
                self._in_memory = self._read_all()
            return np.take(self._in_memory, rows, axis=0, out=values)
        if not values.size:
            return values
        offsets = self._starts[batches, -1] + places * self._row_bytes
        if len(self._files) == 1:
            self._files[0].read_rows(values.reshape(-1).view(np.uint8).data, offsets.tolist())
            return values
        of_file = self._file_of_batch[batches]
        for number in np.unique(of_file):
            here = of_file == number
            part = np.empty((int(here.sum()), self.width), self.dtype)
            self._files[number].read_rows(part.reshape(-1).view(np.uint8).data, offsets[here].tolist())
            values[here] = part
        return values

    def _read_all(self) -> np.ndarray:
        sizes = (self._rows * self._row_bytes).tolist()
        starts = self._starts[:, -1].tolist()
        parts = [
            self._file(number).read(size, start)
            for number, (size, start) in enumerate(zip(sizes, starts, strict=True))
        ]
        return np.frombuffer(b"".join(parts), self.dtype).reshape(len(self), self.width)

    def _least_sizes(self, rows: int) -> tuple[int, ...]:
        return (0,) * (2 if pa.types.is_fixed_size_list(self.type) else 1) + (rows * self._row_bytes,)


class BitColumn(StoredColumn):
    """Truth values, eight in a byte."""

    def take(self, rows: np.ndarray, into: np.ndarray | None = None) -> list[bool]:
        batches, places = self._locate(rows)
        return [
            bool(self._file(batch).read(1, int(self._starts[batch, 1]) + place // 8)[0] >> place % 8 & 1)
            for batch, place in zip(batches.tolist(), places.tolist(), strict=True)
        ]

    def _least_sizes(self, rows: int) -> tuple[int, ...]:
        return 0, -(-rows // 8)


class _ContentColumn(StoredColumn):
    """Rows of different lengths: an offset for each, and their content one after the other."""

    def __init__(self, batches: Sequence[PlacedBatch], schema: pa.Schema, name: str, where: object):
        self._offset = np.dtype(np.int32 if pa.types.is_string(schema.field(name).type) else np.int64)
        super().__init__(batches, schema, name, where)

    @property
    def frame_bytes(self) -> float:
        """Mean size of a row, in bytes."""
        total, size = 0, self._offset.itemsize
        for batch, rows in enumerate(self._rows.tolist()):
            start = int(self._starts[batch, 1])
            ends = self._file(batch).read(size, start) + self._file(batch).read(size, start + rows * size)
            first, last = np.frombuffer(ends, self._offset).tolist()
            total += last - first
        return total / len(self)

    def _contents(self, rows: np.ndarray) -> Iterator[tuple[int, bytes]]:
        """Row numbers and contents."""
        for row, file, start, length in self._places(rows):
            yield row, file.read(length, start) if length else b""

    def _places(self, rows: np.ndarray) -> Iterator[tuple[int, Readable, int, int]]:
        """Row numbers, and file, offset and size of their contents."""
        size = self._offset.itemsize
        for row, batch, place in zip(rows.tolist(), *(part.tolist() for part in self._locate(rows)), strict=True):
            file, (_, offsets, content) = self._file(batch), self._starts[batch].tolist()
            ends = file.read(2 * size, offsets + place * size)
            first, last = np.frombuffer(ends, self._offset).tolist()
            if not 0 <= first <= last <= self._sizes[batch, 2]:
                raise self._damaged(row, f"bytes {first} to {last} of {self._sizes[batch, 2]}")
            yield row, file, content + first, last - first

    def _damaged(self, row: int, why: object) -> StoreError:
        return StoreError(f"row {row} of {self.label} is damaged ({why}): {REBUILD}.")

    def _least_sizes(self, rows: int) -> tuple[int, ...]:
        return 0, (rows + 1) * self._offset.itemsize, 0


class TextColumn(_ContentColumn):
    """Strings."""

    def take(self, rows: np.ndarray, into: np.ndarray | None = None) -> list[str]:
        texts = []
        for row, content in self._contents(rows):
            try:
                texts.append(content.decode())
            except UnicodeDecodeError as error:
                raise self._damaged(row, error) from error
        return texts


class TokenColumn(_ContentColumn):
    """Rows of as many entries of one width as a text has tokens; each row may be a zstd frame.

    Args:
        batches, schema, name, where: see `StoredColumn`.
        kind: type and number of the values of a token.
        lengths: the column that holds the numbers of tokens.
        packed: whether each row is a zstd frame.
    """

    def __init__(
        self,
        batches: Sequence[PlacedBatch],
        schema: pa.Schema,
        name: str,
        where: object,
        kind: tuple[np.dtype, int],
        lengths: FixedColumn,
        packed: bool,
    ):
        super().__init__(batches, schema, name, where)
        (self.dtype, self.width), self._lengths = kind, lengths
        self._codec = pa.Codec("zstd") if packed else None

    def take(self, rows: np.ndarray, into: np.ndarray | None = None) -> np.ndarray:
        """The tokens of the rows one after the other, `(N, width)`; see `StoredColumn.take`."""
        lengths, token = self._lengths.take(rows)[:, 0].tolist(), self.width * self.dtype.itemsize
        places = list(self._places(rows))
        for (row, _, _, held), length in zip(places, lengths, strict=True):
            is_possible = held == length * token if self._codec is None else 0 <= length * token <= held * BEST_PACKED
            if not is_possible:
                raise self._damaged(row, f"{length} tokens in {held} bytes")
        tokens = np.empty((sum(lengths), self.width), self.dtype)
        memory, first = tokens.reshape(-1).view(np.uint8).data, 0
        for (row, file, start, held), length in zip(places, lengths, strict=True):
            last = first + length * token
            if self._codec is None:
                if held:
                    file.read_rows(memory[first:last], [start])
            else:
                memory[first:last] = self._unpack(row, file.read(held, start), last - first)
            first = last
        return tokens

    def _unpack(self, row: int, frame: bytes, size: int) -> memoryview:
        assert self._codec is not None  # rows are packed
        try:
            content = memoryview(self._codec.decompress(frame, size)).cast("B")
        except (OSError, ValueError) as error:
            raise self._damaged(row, error) from error
        if len(content) != size:
            raise self._damaged(row, f"{len(content)} bytes where {size} were expected")
        return content

    @property
    def is_packed(self) -> bool:
        """Whether each row is a zstd frame."""
        return self._codec is not None


class PackedColumn(_ContentColumn):
    """Rows that are zstd frames, each of which is read and unpacked by itself.

    Args:
        batches, schema, name, where: see `StoredColumn`.
        width: bytes of an unpacked row.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, batches: Sequence[PlacedBatch], schema: pa.Schema, name: str, where: object, width: int):
        super().__init__(batches, schema, name, where)
        self.width, self._codec = width, pa.Codec("zstd")

    def take(self, rows: np.ndarray, into: np.ndarray | None = None) -> np.ndarray:
        unpacked = np.empty((len(rows), self.width), self.dtype) if into is None else into
        for place, (row, frame) in enumerate(self._contents(rows)):
            try:
                unpacked[place] = np.frombuffer(self._codec.decompress(frame, self.width), np.uint8)
            except (OSError, ValueError) as error:
                raise self._damaged(row, error) from error
        return unpacked
