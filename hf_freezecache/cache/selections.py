"""Data sets that are selections of rows of another one: the folds of a cross-validation, a split, a shuffled set."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from torch.utils.data import Subset

from .rows import RowSource


@dataclass(frozen=True)
class Selection:
    """A data set as rows of a larger one with the same transform.

    Args:
        whole: the larger one.
        rows: int64 `(N,)`, its row number for every row of the selection.

    Shapes: N rows of the selection.
    """

    whole: Any
    rows: np.ndarray

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
    """The rows that a data set is; None if it is no selection of another one.

    `Dataset.select`, `shuffle`, `sort`, `filter` and `train_test_split`, and torch's `Subset`, also of each other, are
    understood. A `Subset` of a data set without a length, or whose `indices` are no row numbers from 0 on (keys, or
    numbers counted from the end), is none: what else its data set answers is its own affair.

    Args:
        dataset: map-style data set.
    """
    if isinstance(dataset, datasets.Dataset):
        return None if dataset._indices is None else _selection_of_table(dataset)
    if type(dataset) is not Subset:  # a class made from it may read other rows than its `indices`
        return None
    rows = np.asarray(dataset.indices)
    if rows.dtype.kind not in "iu" or not _are_rows(rows, dataset.dataset):
        return None
    rows, inner = rows.astype(np.int64), selection_of(dataset.dataset)
    return Selection(dataset.dataset, rows) if inner is None else Selection(inner.whole, inner.rows[rows])


def _are_rows(rows: np.ndarray, dataset: Any) -> bool:
    return hasattr(dataset, "__len__") and len(rows) > 0 and 0 <= int(rows.min()) and int(rows.max()) < len(dataset)


def _selection_of_table(dataset: datasets.Dataset) -> Selection:
    form = dataset.format
    whole = datasets.Dataset(
        dataset.data, info=dataset.info, split=dataset.split, fingerprint=f"whole-{dataset._fingerprint}"
    ).with_format(
        form["type"],
        columns=form["columns"],
        output_all_columns=form["output_all_columns"],
        **form["format_kwargs"],
    )
    return Selection(whole, np.asarray(dataset._indices.column(0).to_numpy(), dtype=np.int64))
