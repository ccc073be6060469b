"""Rows that stand for a data set: from every source and every class of it, as far as these are cheap to know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset

#: Names under which data sets keep their classes: of columns, and of attributes.
_COLUMNS, _ATTRIBUTES = ("labels", "label"), ("targets", "labels", "samples")


def spread_rows(dataset: Any, most: int, seed: int) -> list[int]:
    """The first and last row, a row of every source and of every class, and others at random.

    Args:
        dataset: map-style data set.
        most: number of rows; where there are more sources and classes, some are left out at random.
        seed: of what is drawn.

    Returns:
        Different row numbers in random order, `most` of them or all.
    """
    rows, generator = len(dataset), np.random.default_rng(seed)
    if rows <= most:
        return generator.permutation(rows).tolist()
    chosen = [0, rows - 1, *_source_starts(dataset)]
    classes = class_of_rows(dataset)
    if classes is not None:
        order = generator.permutation(rows)
        _, first = np.unique(classes[order], return_index=True)
        chosen += generator.permutation(order[first]).tolist()
    chosen += generator.choice(rows, min(rows, 2 * most), replace=False).tolist()
    return generator.permutation(list(dict.fromkeys(chosen))[:most]).tolist()


def in_batches(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    """Batches of one size. What is left over is left out, unless there is nothing else."""
    whole = [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]
    return whole or [rows]


def class_of_rows(dataset: Any) -> np.ndarray | None:
    """The class of each row, int64 `(rows,)`, without reading samples; None where that is not possible."""
    if isinstance(dataset, Subset):
        classes = class_of_rows(dataset.dataset)
        return None if classes is None else classes[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [class_of_rows(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else np.concatenate(parts)  # type: ignore[arg-type]
    if isinstance(dataset, datasets.Dataset):
        return _classes_of_columns(dataset)
    for name in _ATTRIBUTES:
        classes = _as_classes(getattr(dataset, name, None))
        if classes is not None and len(classes) == len(dataset):
            return classes
    return None


def _classes_of_columns(dataset: datasets.Dataset) -> np.ndarray | None:
    kinds = {name: feature for name, feature in dataset.features.items() if name in _COLUMNS}
    kinds |= {name: kind for name, kind in dataset.features.items() if isinstance(kind, datasets.ClassLabel)}
    for name, kind in kinds.items():
        if getattr(kind, "dtype", "").startswith(("int", "uint", "bool")):
            return _as_classes(dataset.select_columns([name]).with_format("arrow")[:].column(name).to_numpy())
    return None


def _as_classes(values: Any) -> np.ndarray | None:
    if isinstance(values, Sequence) and values and isinstance(values[0], (tuple, list)) and len(values[0]) == 2:
        values = [pair[1] for pair in values]  # (path, class), as image folders have them
    if isinstance(values, torch.Tensor):
        values = values.cpu().numpy()
    if not isinstance(values, (Sequence, np.ndarray)) or isinstance(values, (str, bytes)) or len(values) == 0:
        return None
    if isinstance(values, Sequence) and not all(isinstance(value, (int, np.integer)) for value in values):
        return None
    array = np.asarray(values)
    return array.astype(np.int64) if array.ndim == 1 and array.dtype.kind in "iub" else None


def _source_starts(dataset: Any) -> list[int]:
    """The first row of each data set of a `ConcatDataset`, of those inside it too."""
    if not isinstance(dataset, ConcatDataset):
        return []
    starts = [0, *dataset.cumulative_sizes[:-1]]
    return [
        start + inner
        for start, part in zip(starts, dataset.datasets, strict=True)
        if len(part)  # type: ignore[arg-type]  # a `ConcatDataset` takes no others
        for inner in [0, *_source_starts(part)]
    ]
