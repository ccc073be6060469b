"""Data sets that are selections of rows of another one: the folds of a cross-validation, a split, a shuffled set."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from torch.utils.data import Subset

from ..distributed import Group
from .rows import RowSource
from .table_origins import UnknownOrigin, origin_of
from .value_digest import LARGEST_READ, table_digest

#: Rows of a range that are compared where its table is too large to be read as a whole: a number, or a share.
_ROWS, _SHARE = 256, 0.01


@dataclass(frozen=True)
class Selection:
    """A data set as rows of a larger one with the same transform.

    Args:
        whole: the larger one.
        rows: int64 `(N,)`, its row number for every row of the selection.
        cut: the range's own table, if the larger table was inferred from it; None: the data set itself has said it.

    Shapes: N rows of the selection.
    """

    whole: Any
    rows: np.ndarray
    cut: Any = None

    @functools.cached_property
    def is_proved(self) -> bool:
        """Whether the rows of an inferred table have the values of the range's own rows.

        All of them are compared, or of a table of more than 4 GB some all over it: a file may be another one than
        when it was mapped.
        """
        if self.cut is None:
            return True
        total, table = len(self.rows), self.whole.data
        if self.cut.table.nbytes <= LARGEST_READ:
            ends = np.flatnonzero(np.diff(self.rows) != 1) + 1
            pieces = list(zip([0, *ends.tolist()], [*ends.tolist(), total], strict=True))
        else:
            places = np.linspace(0, total - 1, max(_ROWS, int(_SHARE * total))).astype(np.int64)
            pieces = [(place, place + 1) for place in np.unique(places).tolist()]
        return all(
            _is_same(self.cut.fast_slice(begin, end - begin), table.fast_slice(int(self.rows[begin]), end - begin))
            for begin, end in pieces
        )

    def source(self, source: RowSource) -> RowSource:
        """The larger data set, collated as the selection is.

        Args:
            source: the selection.
        """
        whole = copy.copy(source)
        whole.dataset, whole.wide, whole.rule, whole.sizes = self.whole, None, None, None
        if source.probe_rows is not None:
            whole.probe_rows = self.rows[np.asarray(source.probe_rows)].tolist()
        return whole


def selection_of(dataset: Any) -> Selection | None:
    """The rows that a data set is; None if it is no selection of another one, or nothing tells of which.

    `Dataset.select`, `shuffle`, `sort`, `filter` and `train_test_split`, and torch's `Subset`, also of each other, are
    understood. A `Subset` of a data set without a length, or whose `indices` are no row numbers from 0 on (keys, or
    numbers counted from the end), is none: what else its data set answers is its own affair.

    A range of rows without row numbers (`select(range(...))`) is one of the table that it was cut from, see
    `table_origins`. Rows that are selected from a range by their numbers stay a selection of the range.

    Args:
        dataset: map-style data set.
    """
    try:
        range_of = _range_of(dataset)
    except UnknownOrigin:
        return None
    return _numbered_rows_of(dataset) if range_of is None else range_of


def agreed_selection(dataset: Any, group: Group) -> Selection | None:
    """The rows that a data set is; None, too, if the processes do not find the same.

    Args:
        dataset: map-style data set, the same on all processes.
        group: the processes.
    """
    found = selection_of(dataset)
    sizes = group.gather(None if found is None else (len(found.whole), len(found.rows)))
    return found if all(size == sizes[0] for size in sizes) else None


def why_unknown(dataset: Any) -> str | None:
    """Why nothing tells whether a data set is a range of a larger one, or of which, as the end of a sentence.

    Args:
        dataset: map-style data set.

    Returns:
        None if it is a selection that is understood, or none.
    """
    try:
        _range_of(dataset)
    except UnknownOrigin as error:
        return str(error)
    return None


def _range_of(dataset: Any) -> Selection | None:
    if not isinstance(dataset, datasets.Dataset) or dataset._indices is not None:
        return None
    origin = origin_of(dataset.data)
    return None if origin is None else Selection(_with_table(dataset, origin.table), origin.rows, dataset.data)


def _numbered_rows_of(dataset: Any) -> Selection | None:
    if isinstance(dataset, datasets.Dataset):
        if dataset._indices is None:
            return None
        rows = np.asarray(dataset._indices.column(0).to_numpy(), dtype=np.int64)
        return Selection(_with_table(dataset, dataset.data), rows)
    if type(dataset) is not Subset:  # a class made from it may read other rows than its `indices`
        return None
    rows = np.asarray(dataset.indices)
    if rows.dtype.kind not in "iu" or not _are_rows(rows, dataset.dataset):
        return None
    rows, inner = rows.astype(np.int64), _numbered_rows_of(dataset.dataset)
    return Selection(dataset.dataset, rows) if inner is None else Selection(inner.whole, inner.rows[rows])


def _are_rows(rows: np.ndarray, dataset: Any) -> bool:
    return hasattr(dataset, "__len__") and len(rows) > 0 and 0 <= int(rows.min()) and int(rows.max()) < len(dataset)


def _with_table(dataset: datasets.Dataset, table: datasets.table.Table) -> datasets.Dataset:
    """All rows of a table, with the format and the transform of a data set."""
    form = dataset.format
    return datasets.Dataset(
        table, info=dataset.info, split=dataset.split, fingerprint=f"whole-{dataset._fingerprint}"
    ).with_format(
        form["type"],
        columns=form["columns"],
        output_all_columns=form["output_all_columns"],
        **form["format_kwargs"],
    )


def _is_same(table: pa.Table, other: pa.Table) -> bool:
    """Whether two tables hold the same values; NaN is the same as NaN."""
    if not table.schema.equals(other.schema) or len(table) != len(other):
        return False
    return all(
        table.column(place).equals(other.column(place))
        or table_digest(table.select([place])) == table_digest(other.select([place]))
        for place in range(table.num_columns)
    )
