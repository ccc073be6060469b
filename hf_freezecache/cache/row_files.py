"""The files from which the rows of a data set are read, and whether they are still the same."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
import xxhash
from torch.utils.data import ConcatDataset, Subset

from ..rng import hash_key

#: Note of a store that describes the files of its rows.
ROW_FILES = "row_files"
#: Its tensors: size in bytes, time of the last change in ns, and the content's digest if it was read.
SIZE, TIME, CONTENT = "bytes", "mtime_ns", "content"
#: Bytes of a content's digest.
_DIGEST = 16
#: How deep data sets that wrap others are followed.
_MOST_WRAPPED = 8

Files = list[tuple[str, ...]]


def files_of(dataset: Any, depth: int = 0) -> Files | None:
    """The files of every row, by its number; None if the data set does not tell them.

    Columns of images or sounds with paths, `samples` and `imgs` of folders of images, attributes that are lists of
    paths, one a row, and data sets made of such by `Subset` and `ConcatDataset`, are understood.

    Args:
        dataset: map-style data set.
        depth: how many data sets wrap it.
    """
    if isinstance(dataset, datasets.Dataset):
        return _files_of_columns(dataset)
    if isinstance(dataset, Subset):
        inner = files_of(dataset.dataset, depth + 1)
        return None if inner is None else [inner[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts: list[tuple[Any, Files | None]] = [(part, files_of(part, depth + 1)) for part in dataset.datasets]
        if all(files is None for _, files in parts):
            return None
        return [row for part, files in parts for row in (files if files is not None else [()] * len(part))]
    return (
        _files_of_attributes(dataset, depth) if hasattr(dataset, "__dict__") and hasattr(dataset, "__len__") else None
    )


def known_files(dataset: Any) -> frozenset[str]:
    """The paths of all files of the rows."""
    return frozenset(path for row in files_of(dataset) or () for path in row)


def describe_files(files: Files, content: bool) -> dict[str, torch.Tensor]:
    """Sizes and times of the files of all rows; several files of a row are put together.

    Args:
        files: of every row.
        content: whether to read the files as well.

    Returns:
        `bytes`, int64 `(N,)`, -1 where a file is missing; `mtime_ns`, int64 `(N,)`; `content`, uint8 `(N, 16)`, only
        if the files were read.

    Shapes: N rows.
    """
    sizes, times = torch.zeros(len(files), dtype=torch.int64), torch.zeros(len(files), dtype=torch.int64)
    contents = torch.zeros(len(files), _DIGEST, dtype=torch.uint8)
    for row, paths in enumerate(files):
        digest = xxhash.xxh3_128()
        for path in paths:
            try:
                status = os.stat(path)
                times[row] = status.st_mtime_ns if len(paths) == 1 else _mixed(int(times[row]), status.st_mtime_ns)
                sizes[row] += status.st_size
                if content:
                    digest.update(Path(path).read_bytes())
            except OSError:
                sizes[row] = -1
        if content:
            contents[row] = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
    return {SIZE: sizes, TIME: times, **({CONTENT: contents} if content else {})}


def changed_rows(before: Mapping[str, torch.Tensor], now: Mapping[str, torch.Tensor]) -> list[int]:
    """Rows whose files have changed: in size, or in content where both tell it, else in time.

    Args:
        before, now: what `describe_files` returned.
    """
    if len(before[SIZE]) != len(now[SIZE]):
        return list(range(len(now[SIZE])))
    changed = before[SIZE] != now[SIZE]
    if CONTENT in before and CONTENT in now:
        changed |= (before[CONTENT] != now[CONTENT]).any(1)
    else:
        changed |= before[TIME] != now[TIME]
    return changed.nonzero()[:, 0].tolist()


def _mixed(total: int, time: int) -> int:
    return hash_key(total, time) >> 1


def _files_of_columns(dataset: datasets.Dataset) -> Files | None:
    columns: list[list[str | None]] = []
    for name, feature in dataset.features.items():
        stored = dataset.data.column(name)
        if isinstance(feature, datasets.Image | datasets.Audio):
            columns.append(_paths(stored))
        elif isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string") and len(stored):
            first = stored[0].as_py()
            if first is not None and _is_file(first):
                columns.append(stored.to_pylist())
    if not any(any(column) for column in columns):
        return None
    files = [tuple(path for path in row if path) for row in zip(*columns, strict=True)]
    if dataset._indices is None:
        return files
    return [files[index] for index in dataset._indices.column(0).to_pylist()]


def _paths(column: pa.ChunkedArray) -> list[str | None]:
    """Paths of the rows whose bytes are not in the table."""
    paths: list[str | None] = []
    for chunk in column.chunks:
        if not pa.types.is_struct(chunk.type):
            paths += [None] * len(chunk)
            continue
        held = chunk.field("bytes").is_valid().to_pylist()
        paths += [
            None if is_held else path for path, is_held in zip(chunk.field("path").to_pylist(), held, strict=True)
        ]
    return paths


def _files_of_attributes(dataset: Any, depth: int) -> Files | None:
    if depth >= _MOST_WRAPPED:
        return None
    columns, rows = [], len(dataset)
    for name, value in sorted(vars(dataset).items()):
        if isinstance(value, list | tuple | np.ndarray) and len(value) == rows and rows:
            paths = [_path_in(entry) for entry in value] if _path_in(value[0]) is not None else None
            if paths is not None and all(path is not None for path in paths) and _is_file(str(paths[0])):
                columns.append([str(path) for path in paths])
        elif isinstance(value, torch.utils.data.Dataset | datasets.Dataset) and name != "dataset_info":
            inner = files_of(value, depth + 1) if len(value) == rows else None  # type: ignore[arg-type]
            if inner is not None:
                columns.extend(_columns(inner))
    return [tuple(dict.fromkeys(row)) for row in zip(*columns, strict=True)] if columns else None


def _columns(files: Files) -> Iterator[list[str]]:
    for place in range(min(map(len, files))):
        yield [row[place] for row in files]


def _path_in(entry: Any) -> str | os.PathLike | None:
    """The path that an entry is, or that is the first value of it."""
    if isinstance(entry, list | tuple) and entry:
        entry = entry[0]
    return entry if isinstance(entry, str | os.PathLike) else None


def _is_file(path: str) -> bool:
    return os.path.isfile(path)
