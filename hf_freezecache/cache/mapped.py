"""Fixed-width columns read straight out of memory-mapped Arrow files."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


class MappedColumn:
    """One column of a store, as views on the mapped files.

    Record batches of equal size lie in a file at equal distances. Such a run is seen as one strided array, and random
    rows of it are a single fancy index: as fast as on an `np.memmap`, where Arrow's `take` goes through index arrays.

    Args:
        column: fixed-size lists, or plain numbers; no nulls.
    """

    def __init__(self, column: pa.ChunkedArray):
        self._column = column  # keeps all files mapped: a run may reach from one into the next
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
            `(B, width)` array of its own.

        Raises:
            IndexError: if a row does not exist.
        """
        if len(rows) and not (0 <= rows.min() and rows.max() < len(self)):
            raise IndexError(f"rows {rows.min()}..{rows.max()} are asked for; there are {len(self)}.")
        if len(self._runs) == 1:
            return _take(self._runs[0][1], rows)
        taken = np.empty((len(rows), self.width), self.dtype)
        run_of_row = np.searchsorted(self._starts, rows, "right") - 1
        for run in np.unique(run_of_row):
            here = run_of_row == run
            taken[here] = _take(self._runs[run][1], rows[here] - self._starts[run])
        return taken


def _take(batches: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return batches[np.divmod(rows, batches.shape[1])]


def _view(chunk: pa.Array) -> np.ndarray:
    """A record batch's column as `(rows, width)` on the mapped buffer."""
    values = chunk.flatten() if pa.types.is_fixed_size_list(chunk.type) else chunk
    return values.to_numpy(zero_copy_only=True).reshape(len(chunk), -1)


def _equidistant_runs(views: list[np.ndarray]) -> list[tuple[int, np.ndarray]]:
    """Joins neighbouring batches that lie at equal distances into arrays `(batches, rows, width)`.

    Returns:
        Number of rows and array per run. The last batch of a run may be shorter than its place in the array: what
        lies behind it is not a row and must not be read.
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
