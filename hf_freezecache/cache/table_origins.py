"""Ranges of the rows of a table of `datasets`, as rows of the larger table that they were cut from.

`Dataset.select(range(...))`, `train_test_split(shuffle=False)` and `split="train[:80%]"` leave no row numbers: they
cut the table. A mapped table remembers its file and the cuts; a table in memory lies in the memory of the larger one.
What is inferred so is compared by value before a store is read by it, see `Selection.is_proved`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets.table import ConcatenationTable, InMemoryTable, MemoryMappedTable, Table, concat_tables

#: What changes columns and no rows, so that a cut may be left out though this comes behind it.
_OF_COLUMNS = {
    "cast",
    "combine_chunks",
    "drop",
    "flatten",
    "remove_column",
    "rename_columns",
    "replace_schema_metadata",
    "select",
}
#: A file of a data set that has several: `train-00000-of-00005.arrow`, `cache-1f_00000_of_00004.arrow`.
_NUMBERED = re.compile(r"(.*[-_])(\d{5,})([-_]of[-_])(\d{5,})(\.arrow)", re.DOTALL)


class UnknownOrigin(ValueError):
    """Nothing tells which rows of which table these are; the message says why, as the end of a sentence."""


@dataclass(frozen=True)
class Origin:
    """The larger table that a range was cut from.

    Args:
        table: the larger one, its files opened anew.
        rows: int64 `(N,)`, its row number for every row of the range.

    Shapes: N rows of the range.
    """

    table: Table
    rows: np.ndarray


@dataclass(frozen=True)
class _Strip:
    """Consecutive rows of a table: blocks side by side, each with some of the columns.

    Args:
        key: equal for ranges of the same larger blocks.
        wholes: the larger blocks.
        start: row of these at which the strip begins.
        rows: of the strip.
        is_range: whether it was cut.
    """

    key: Hashable
    wholes: Sequence[Table]
    start: int
    rows: int
    is_range: bool


def origin_of(table: Table) -> Origin | None:
    """The larger table that a table was cut from last; None if it was not cut.

    Of a data set of numbered files all are opened, as a cut forgets those of which it holds no row. Of other tables
    that were put together it forgets them, too: then the larger one is what the range touches.

    Args:
        table: of a data set.

    Raises:
        UnknownOrigin: if it was cut, or may have been, and nothing tells from what.
    """
    blocks = table.blocks if isinstance(table, ConcatenationTable) else [[table]]
    if not all(isinstance(block, InMemoryTable | MemoryMappedTable) for row in blocks for block in row):
        return None
    strips = [_strip_of(row) for row in blocks]
    if not any(strip.is_range for strip in strips):
        return None
    if isinstance(table, ConcatenationTable) and any(_starts(whole) for strip in strips for whole in strip.wholes):
        raise UnknownOrigin("it is a range of a range of several tables, which keeps only the tables of its own rows")
    wholes: dict[Hashable, Sequence[Table]] = {}
    for strip in strips:
        for key, whole in _with_siblings(strip):
            wholes.setdefault(key, whole)
    lengths = [len(whole[0]) for whole in wholes.values()]
    starts = dict(zip(wholes, np.cumsum([0, *lengths]).tolist(), strict=False))
    rows = np.concatenate([starts[strip.key] + strip.start + np.arange(strip.rows) for strip in strips])
    if len(rows) == sum(lengths) and (rows == np.arange(len(rows))).all():
        return None  # all rows of it
    try:
        return Origin(concat_tables([concat_tables(list(whole), axis=1) for whole in wholes.values()]), rows)
    except pa.ArrowException as error:
        raise UnknownOrigin(f"the files beside its own hold other columns ({error})") from error


def ranges_of(table: Table) -> list[tuple[int, int]]:
    """First row within its file, and number of rows, of every block of a table; 0 for one that was not cut."""
    blocks = table.blocks if isinstance(table, ConcatenationTable) else [[table]]
    return [(sum(_starts(block)), len(block)) for row in blocks for block in row]


def _starts(block: Table) -> list[int]:
    """The first rows of all cuts of a mapped table, each within what the cut before it has left."""
    replays = block.replays if isinstance(block, MemoryMappedTable) else []
    return [args[0] for name, args, _ in replays if name == "slice"]


def _strip_of(blocks: Sequence[Table]) -> _Strip:
    found = [_of_file(block) if isinstance(block, MemoryMappedTable) else _of_memory(block) for block in blocks]
    first, whole_rows = found[0], {len(whole) for strip in found for whole in strip.wholes}
    if any(strip.start != first.start for strip in found) or len(whole_rows) > 1:
        raise UnknownOrigin("columns were added to it that the larger data set does not have")
    if first.start + first.rows > len(first.wholes[0]):
        raise UnknownOrigin("its file has fewer rows by now")
    wholes = [whole for strip in found for whole in strip.wholes]
    return _Strip(
        tuple(strip.key for strip in found), wholes, first.start, first.rows, any(strip.is_range for strip in found)
    )


def _of_file(block: MemoryMappedTable) -> _Strip:
    places = [place for place, (name, _, _) in enumerate(block.replays) if name == "slice"]
    if not places:
        return _Strip(_file_key(block.path, block.replays), [block], 0, len(block), is_range=False)
    last = places[-1]
    behind = {name for name, _, _ in block.replays[last + 1 :]} - _OF_COLUMNS
    if behind:
        raise UnknownOrigin(f"after the range was cut, its table was changed by {', '.join(sorted(behind))}")
    replays = [*block.replays[:last], *block.replays[last + 1 :]]
    whole = _open(block.path, replays)
    return _Strip(_file_key(block.path, replays), [whole], block.replays[last][1][0], len(block), is_range=True)


def _file_key(path: str, replays: Sequence[Any]) -> Hashable:
    return path, repr(replays)


def _open(path: str, replays: Sequence[Any]) -> MemoryMappedTable:
    try:
        return MemoryMappedTable.from_file(path, list(replays))
    except (OSError, pa.ArrowException) as error:
        raise UnknownOrigin(f"{path} cannot be opened again ({error})") from error


def _with_siblings(strip: _Strip) -> Iterator[tuple[Hashable, Sequence[Table]]]:
    """The larger blocks of a strip, between those of the other files of its data set where they are numbered."""
    block = strip.wholes[0]
    match = _NUMBERED.fullmatch(block.path) if isinstance(block, MemoryMappedTable) else None
    if match is None or len(strip.wholes) > 1 or not strip.is_range:
        yield strip.key, strip.wholes
        return
    before, number, of, count, end = match.groups()
    paths = [f"{before}{place:0{len(number)}d}{of}{count}{end}" for place in range(int(count))]
    if not all(os.path.isfile(path) for path in paths):
        paths = [block.path]
    for path in paths:
        is_own = path == block.path
        yield (_file_key(path, block.replays),), [block if is_own else _open(path, block.replays)]


# Tables in memory


def _of_memory(block: Table) -> _Strip:
    """A table in memory, whose columns may be ranges of larger arrays: Arrow does not copy what it cuts."""
    columns = block.table.columns
    if any(column.num_chunks != 1 for column in columns) or not columns:
        pieces = max((column.num_chunks for column in columns), default=0)
        raise UnknownOrigin(f"its table lies in memory in {pieces} pieces, of which a range keeps only its own")
    arrays = [column.chunk(0) for column in columns]
    starts, capacities = {array.offset for array in arrays}, [_capacity(array) for array in arrays]
    total = min((capacity for capacity in capacities if capacity is not None), default=len(block))
    start = max(starts)
    key = tuple(buffer.address for array in arrays for buffer in array.buffers() if buffer is not None)
    if total <= len(block) and not start:
        return _Strip(key, [block], 0, len(block), is_range=False)
    if len(starts) > 1 or total < start + len(block):
        raise UnknownOrigin("some of its columns were changed in memory after the range was cut")
    try:
        whole = pa.Table.from_arrays([_widened(array, total) for array in arrays], schema=block.table.schema)
        whole.validate(full=True)
    except pa.ArrowException as error:
        raise UnknownOrigin(f"the memory around it holds no rows ({error})") from error
    return _Strip(key, [InMemoryTable(whole)], start, len(block), is_range=True)


def _capacity(array: pa.Array) -> int | None:
    """How many rows the memory of an array holds from its beginning on; None where only another column can tell.

    Raises:
        UnknownOrigin: if it is of a kind of which that is not known.
    """
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return _capacity(array.storage)
    if pa.types.is_boolean(kind) or pa.types.is_null(kind):
        return None
    if pa.types.is_struct(kind):
        fields = [array.field(place) for place in range(kind.num_fields)]
        if any(field.offset != array.offset for field in fields):
            raise UnknownOrigin(f"the memory of its columns of type {kind} does not begin at one row")
        return min((found for found in map(_capacity, fields) if found is not None), default=None)
    if pa.types.is_fixed_size_list(kind):
        return len(array.values) // max(1, kind.list_size)
    width, values = _offset_bytes(kind), array.buffers()[1]
    if values is None:  # of no rows
        return 0
    if width is not None:
        return values.size // width - 1
    if not pa.types.is_primitive(kind) and not pa.types.is_fixed_size_binary(kind) and not pa.types.is_decimal(kind):
        raise UnknownOrigin(f"it has columns of type {kind}, which do not tell where they were cut")
    return 8 * values.size // max(1, kind.bit_width)


def _offset_bytes(kind: pa.DataType) -> int | None:
    """Bytes of an offset in arrays of values of any length; None for other types."""
    if pa.types.is_list(kind) or pa.types.is_string(kind) or pa.types.is_binary(kind):
        return 4
    is_large = pa.types.is_large_list(kind) or pa.types.is_large_string(kind) or pa.types.is_large_binary(kind)
    return 8 if is_large else None


def _widened(array: pa.Array, rows: int) -> pa.Array:
    """The first rows of the memory that an array is a range of."""
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return pa.ExtensionArray.from_storage(kind, _widened(array.storage, rows))
    if pa.types.is_null(kind):
        return pa.nulls(rows)
    if pa.types.is_struct(kind):
        fields = [_widened(array.field(place), rows) for place in range(kind.num_fields)]
        return pa.Array.from_buffers(kind, rows, array.buffers()[:1], children=fields)
    if pa.types.is_fixed_size_list(kind):
        return pa.Array.from_buffers(kind, rows, array.buffers()[:1], children=[array.values])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.Array.from_buffers(kind, rows, array.buffers()[:2], children=[array.values])
    return pa.Array.from_buffers(kind, rows, array.buffers())
