"""Reading rows of equal width directly from memory-mapped Arrow files."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from .manifest import StoreError


class MappedColumn:
    """One column of a store, as arrays that share the memory of the mapped files.

    Record batches of equal size have equal distances in a file. A run of them is one strided array, so that reading
    random rows is a single fancy index, as fast as on an `np.memmap`. Arrow's `take` is slower: it goes through index
    arrays.

    Args:
        column: fixed-size lists, or plain numbers; no nulls.

    Attributes:
        width: number of values of a row.
        dtype: NumPy type of a value.
    """

    def __init__(self, column: pa.ChunkedArray):
        self._column = column  # keeps all files mapped: a run may cover the end of one and the start of the next
        views = [_view(chunk) for chunk in column.chunks if len(chunk)]
        self._runs = _equidistant_runs(views)
        self._starts = np.cumsum([0, *(run_rows for run_rows, _ in self._runs)])
        self.width, self.dtype = views[0].shape[1], views[0].dtype

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Copies rows.

        Args:
            rows: int64 row numbers `(B,)`, in any order.

        Returns:
            `(B, width)` array, a copy.

        Raises:
            IndexError: if a row does not exist.

        Shapes: B rows.
        """
        _check_range(rows, len(self))
        if len(self._runs) == 1:
            return _take(self._runs[0][1], rows)
        values = np.empty((len(rows), self.width), self.dtype)
        run_of_row = np.searchsorted(self._starts, rows, "right") - 1
        for run in np.unique(run_of_row):
            here = run_of_row == run
            values[here] = _take(self._runs[run][1], rows[here] - self._starts[run])
        return values


class PackedColumn:
    """One column of a store whose rows are zstd frames, each of which is read and unpacked by itself.

    Args:
        column: frames as large binaries; no nulls.
        width: bytes of an unpacked row.
        name: names the column and its store in error messages.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, column: pa.ChunkedArray, width: int, name: str):
        self._column = column  # keeps all files mapped
        self.width, self.name = width, name
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._starts = np.cumsum([0, *map(len, chunks)])
        self._ends = [
            np.frombuffer(chunk.buffers()[1], np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
            for chunk in chunks
        ]
        self._contents = [chunk.buffers()[2] for chunk in chunks]
        self._codec = pa.Codec("zstd")

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def frame_bytes(self) -> float:
        """Mean size of a packed row, in bytes."""
        return sum(int(ends[-1] - ends[0]) for ends in self._ends) / len(self)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Unpacks rows.

        Args:
            rows: int64 row numbers `(B,)`, in any order.

        Returns:
            uint8 `(B, width)`.

        Raises:
            IndexError: if a row does not exist.
            StoreError: if a frame is damaged; the message names the row.

        Shapes: B rows.
        """
        _check_range(rows, len(self))
        unpacked = np.empty((len(rows), self.width), self.dtype)
        chunk_of_row = np.searchsorted(self._starts, rows, "right") - 1
        for place, (row, chunk) in enumerate(zip(rows.tolist(), chunk_of_row.tolist(), strict=True)):
            here = row - self._starts[chunk]
            first, last = self._ends[chunk][here : here + 2].tolist()
            content = self._contents[chunk]
            try:
                if not 0 <= first <= last <= content.size:
                    raise OSError(f"bytes {first} to {last} of {content.size}")
                row_bytes = self._codec.decompress(content.slice(first, last - first), self.width)
            except OSError as error:
                raise StoreError(
                    f"row {row} of {self.name} is damaged ({error}): delete the store, it is built again."
                ) from error
            unpacked[place] = np.frombuffer(row_bytes, np.uint8)
        return unpacked


def _check_range(rows: np.ndarray, count: int) -> None:
    if len(rows) and not (0 <= rows.min() and rows.max() < count):
        raise IndexError(f"rows {rows.min()}..{rows.max()} were requested; there are {count}.")


def _take(batches: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return batches[np.divmod(rows, batches.shape[1])]


def _view(chunk: pa.Array) -> np.ndarray:
    """The column of a record batch as an array `(rows, width)` that shares the mapped memory."""
    values = chunk.flatten() if pa.types.is_fixed_size_list(chunk.type) else chunk
    return values.to_numpy(zero_copy_only=True).reshape(len(chunk), -1)


def _equidistant_runs(views: list[np.ndarray]) -> list[tuple[int, np.ndarray]]:
    """Joins neighbouring batches at equal distances in memory to arrays `(batches, rows, width)`.

    Returns:
        Number of rows and array of each run. The last batch of a run may be shorter than its place in the array: the
        memory behind it holds no rows and must not be read.
    """
    runs, first = [], 0
    while first < len(views):
        last, per_batch = first, len(views[first])
        distance = None
        while last + 1 < len(views) and len(views[last]) == per_batch >= len(views[last + 1]):
            step = _address(views[last + 1]) - _address(views[last])
            if step <= 0 or distance not in (None, step):
                break
            distance, last = step, last + 1
        view = views[first]
        shape = (last - first + 1, *view.shape)
        strides = (view.nbytes if distance is None else distance, *view.strides)
        strided = np.lib.stride_tricks.as_strided(view, shape, strides, writeable=False)
        runs.append((sum(len(part) for part in views[first : last + 1]), strided))
        first = last + 1
    return runs


def _address(view: np.ndarray) -> int:
    return view.__array_interface__["data"][0]
