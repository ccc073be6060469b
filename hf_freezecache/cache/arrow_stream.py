"""Where the columns of an Arrow stream are in its file, found without mapping the file or reading its content.

pyarrow gives the place of a column only in memory: of a mapped file, which ends the process where the file is cut
short, or of a copy. The messages in front of the record batches say it as well (Arrow's "IPC Streaming Format"; they
are FlatBuffers).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa

from .held_files import Readable
from .manifest import REBUILD, StoreError, translated

_CONTINUATION = -1
_SCHEMA, _RECORD_BATCH = 1, 3
#: A message is far smaller: it names columns, not rows.
_LARGEST_MESSAGE = 1 << 28


class BatchLayout(NamedTuple):
    """Where the columns of a record batch are. Batches of equal sizes have equal layouts.

    Args:
        rows: number of rows.
        nulls: number of nulls of each field, children included.
        buffers: offset, from the batch's body on, and length of each buffer.
        body: bytes of the body.
    """

    rows: int
    nulls: tuple[int, ...]
    buffers: tuple[tuple[int, int], ...]
    body: int


class PlacedBatch(NamedTuple):
    """A record batch in a file.

    Args:
        file: the file.
        start: offset of its body.
        layout: of its columns.
    """

    file: Readable
    start: int
    layout: BatchLayout


def read_stream(file: Readable) -> tuple[pa.Schema, list[PlacedBatch]]:
    """The schema and the record batches of a file that holds an Arrow stream.

    Raises:
        StoreError: if it holds none, is damaged, or has what no store has (dictionaries, compression).
    """
    with translated(f"{file.name} is no Arrow file of a store"):
        messages = _messages(file)
        first, _ = next(messages)
        schema = pa.ipc.read_schema(pa.py_buffer(first))
        layouts: dict[bytes, BatchLayout] = {}
        batches = []
        for message, start in messages:
            layout = layouts.get(message)
            if layout is None:
                layout = layouts[message] = _read_layout(message)
            batches.append(PlacedBatch(file, start, layout))
        return schema, batches


def _messages(file: Readable) -> Iterator[tuple[bytes, int]]:
    """Messages with their prefixes, and where their bodies begin. The first one is the schema."""
    offset, guess, kind = 0, 1024, _SCHEMA
    while True:
        prefix = file.read(min(guess, file.size - offset), offset)
        continuation, size = struct.unpack_from("<ii", prefix)
        if continuation != _CONTINUATION or not 0 <= size <= min(_LARGEST_MESSAGE, file.size - offset - 8):
            raise ValueError(f"no message at byte {offset}")
        if size == 0:
            if offset + 8 != file.size or kind == _SCHEMA:
                raise ValueError(f"it ends at byte {offset}")
            return
        message = prefix[: 8 + size] if len(prefix) >= 8 + size else file.read(8 + size, offset)
        fields = _Table(message, 8)
        found, body = fields.number("<B", 1), fields.number("<q", 3)
        start = offset + 8 + size
        if found != kind or not 0 <= body <= file.size - start:
            raise ValueError(f"no message of kind {kind} at byte {offset}")
        yield message, start
        offset, guess, kind = start + body, 8 + size, _RECORD_BATCH


def _read_layout(message: bytes) -> BatchLayout:
    fields = _Table(message, 8)
    batch = fields.table(2)
    if batch.has(3):
        raise ValueError("its record batches are compressed")
    rows, body = batch.number("<q", 0), fields.number("<q", 3)
    nodes, buffers = batch.pairs(1), batch.pairs(2)
    if rows < 0 or any(not 0 <= offset <= offset + length <= body for offset, length in buffers):
        raise ValueError("its record batches reach beyond their place")
    return BatchLayout(rows, tuple(nulls for _, nulls in nodes), buffers, body)


class _Table:
    """A table of a FlatBuffer: fields by number, at offsets that its vtable gives.

    Args:
        content: the message.
        root: where the offset of the table stands.
    """

    def __init__(self, content: bytes, root: int):
        self._content = content
        self._start = root + self._unpack("<I", root)
        self._vtable = self._start - self._unpack("<i", self._start)
        self._vtable_bytes = self._unpack("<H", self._vtable)

    def has(self, field: int) -> bool:
        return self._place(field) is not None

    def number(self, kind: str, field: int) -> int:
        """A scalar; 0, the default, where it is left out."""
        place = self._place(field)
        return 0 if place is None else self._unpack(kind, place)

    def table(self, field: int) -> _Table:
        return _Table(self._content, self._required(field))

    def pairs(self, field: int) -> tuple[tuple[int, int], ...]:
        """A vector of structs of two int64."""
        place = self._required(field)
        first = place + self._unpack("<I", place)
        count = self._unpack("<I", first)
        if 16 * count > len(self._content):
            raise ValueError("a vector reaches beyond its message")
        values: Sequence[int] = struct.unpack_from(f"<{2 * count}q", self._content, first + 4)
        return tuple(zip(values[::2], values[1::2], strict=True))

    def _required(self, field: int) -> int:
        place = self._place(field)
        if place is None:
            raise ValueError(f"field {field} of a message is missing")
        return place

    def _place(self, field: int) -> int | None:
        entry = 4 + 2 * field
        if entry + 2 > self._vtable_bytes:
            return None
        offset = self._unpack("<H", self._vtable + entry)
        return self._start + offset if offset else None

    def _unpack(self, kind: str, place: int) -> int:
        if place < 0:
            raise ValueError("an offset of a message is negative")
        return struct.unpack_from(kind, self._content, place)[0]


def buffer_places(schema: pa.Schema) -> dict[str, tuple[slice, slice]]:
    """For each column, which of a batch's fields and buffers are its own.

    Raises:
        StoreError: if a column has a type that no store has.
    """
    places: dict[str, tuple[slice, slice]] = {}
    node = buffer = 0
    for field in schema:
        nodes, buffers = _extent(field.type)
        if not nodes:
            raise StoreError(f"column {field.name!r} has the type {field.type}, which no store has: {REBUILD}.")
        places[field.name] = slice(node, node + nodes), slice(buffer, buffer + buffers)
        node, buffer = node + nodes, buffer + buffers
    return places


def _extent(kind: pa.DataType) -> tuple[int, int]:
    """Number of fields and buffers of a type that a store has; zeros for any other."""
    if pa.types.is_fixed_size_list(kind) and pa.types.is_primitive(kind.value_type):
        return 2, 3  # validity; validity and values of the child
    if pa.types.is_primitive(kind):
        return 1, 2  # validity, values
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_large_binary(kind):
        return 1, 3  # validity, offsets, content
    return 0, 0
