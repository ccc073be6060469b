"""The user's samples as model inputs: fetching, collating, and what of a batch belongs to a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data import Dataset as TorchDataset

from ..augment.draws import Draw, use_draw
from ..rng import seeded_rng
from .names import is_reserved

#: torch dtypes that a column can have -> the NumPy type in which Arrow keeps it.
_STORED_AS = {
    torch.bool: "uint8",
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.float16: "float16",
    torch.bfloat16: "float32",
    torch.float32: "float32",
    torch.float64: "float64",
}


class RowError(ValueError):
    """What the collator returns cannot be kept per row; the message names the entry and the reason."""


@dataclass(frozen=True)
class InputColumn:
    """One entry of a collated batch that is kept per row: a tensor `(B, *shape)`, or a list of strings or numbers.

    Args:
        dtype: name of the torch dtype (`int64`), or `str`, `int`, `float`, `bool` for a list.
        shape: shape of a row.
        is_list: whether the entry is a list.
    """

    dtype: str
    shape: tuple[int, ...] = ()
    is_list: bool = False

    @property
    def stored_as(self) -> str:
        """NumPy type in which Arrow keeps a tensor entry."""
        return _STORED_AS[getattr(torch, self.dtype)]

    def to_numpy(self, value: torch.Tensor) -> np.ndarray:
        """`(B, *shape)` tensor -> `(B, n)` array as stored."""
        flat = value.detach().cpu().reshape(len(value), -1)
        if flat.dtype == torch.bfloat16:
            flat = flat.float()
        if flat.dtype == torch.bool:
            flat = flat.to(torch.uint8)
        return flat.contiguous().numpy()

    def to_tensor(self, rows: np.ndarray) -> torch.Tensor:
        """`(B, n)` array as stored -> `(B, *shape)` tensor."""
        return torch.from_numpy(rows).to(getattr(torch, self.dtype)).reshape(len(rows), *self.shape)


@dataclass(frozen=True)
class BatchSplit:
    """A collated batch apart: the main input, what belongs to the rows, and what is the same for every batch."""

    main: torch.Tensor
    columns: dict[str, Any]
    constants: dict[str, Any]

    def describe(self) -> dict[str, InputColumn]:
        """The column of every per-row entry."""
        described = {}
        for name, value in self.columns.items():
            if isinstance(value, torch.Tensor):
                described[name] = InputColumn(str(value.dtype).removeprefix("torch."), tuple(value.shape[1:]))
            else:
                described[name] = InputColumn(type(value[0]).__name__, is_list=True)
        return described


def split_batch(batch: Mapping[str, Any], main_input: str) -> BatchSplit:
    """Takes a collated batch apart.

    Raises:
        RowError: if the main input is missing or an entry can neither be kept per row nor is a plain constant.
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get(main_input), torch.Tensor):
        found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise RowError(f"the data collator must return a dict with the tensor '{main_input}'; it returned {found}.")
    main = batch[main_input]
    clashing = sorted(name for name in batch if is_reserved(name))
    if clashing:
        raise RowError(f"the collator's {clashing} clash with a store's columns: rename.")
    columns, constants = {}, {}
    for name, value in batch.items():
        if name == main_input:
            continue
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == len(main):
            if value.dtype not in _STORED_AS:
                raise RowError(f"the collator's '{name}' has dtype {value.dtype}, which cannot be kept in a store.")
            columns[name] = value
        elif isinstance(value, (list, tuple)) and len(value) == len(main) and _plain(value):
            columns[name] = list(value)
        elif value is None or isinstance(value, (bool, int, float, str)):
            constants[name] = value
        else:
            raise RowError(
                f"the collator's '{name}' is neither one value per sample nor a plain constant "
                f"({type(value).__name__}), so it cannot be replayed; leave it out, or use cache='never'."
            )
    return BatchSplit(main, columns, constants)


def _plain(values: Sequence[Any]) -> bool:
    kinds = {type(value) for value in values}
    return len(kinds) == 1 and kinds <= {str, int, float, bool}


def fetch(dataset: Any, indices: Sequence[int]) -> Any:
    """The samples as a DataLoader hands them to the collator."""
    if hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(list(indices))
    return [dataset[index] for index in indices]


@dataclass(frozen=True)
class DrawnBatch:
    """One view of a few samples.

    Args:
        batch: as the collator returned it.
        geometry: `(B, G)` rows of the views' geometry; None if it was not asked for or no transform told it.
        refused: why a replayable transform could not tell it.
    """

    batch: Mapping[str, Any]
    geometry: torch.Tensor | None = None
    refused: str | None = None


class RowSource:
    """A map-style data set with its collator, read in fixed ranges that depend on nothing but the batch size.

    Args:
        dataset: the user's data set, transform included.
        collator: the user's collator.
        batch_size: rows of a range; the last one may be shorter.
        seed: what is drawn for a view of a sample depends on it, the sample and the view (`ReplayableTransform`), or
            on it, the range's first row and the view (any other transform or collator).
        num_workers: processes that load ahead.
        multiprocessing_context: how they are started.
    """

    def __init__(
        self,
        dataset: Any,
        collator: Callable,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        multiprocessing_context: Any = None,
    ):
        self.dataset, self.collator, self.batch_size, self.seed = dataset, collator, batch_size, seed
        self.num_workers, self.multiprocessing_context = num_workers, multiprocessing_context

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def num_ranges(self) -> int:
        return -(-len(self) // self.batch_size)

    def rows(self, batch: int) -> Sequence[int]:
        """Row numbers of a range."""
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, len(self)))

    def draw(
        self,
        indices: Sequence[int],
        view: int = 0,
        geometry: tuple[str, tuple[int, int]] | None = None,
        again: int = 0,
    ) -> DrawnBatch:
        """A view of some samples.

        Args:
            indices: row numbers.
            view: 0 is the base view of a `ReplayableTransform`; of any other transform it is a draw as every one.
            geometry: kind and feature grid in which the view's geometry is wanted.
            again: another draw of what is random besides a `ReplayableTransform`.
        """
        wanted = Draw(self.seed, indices, view=view, geometry=geometry)
        with seeded_rng(self.seed, indices[0], view, *([again] if again else [])):
            with use_draw(wanted):
                samples = fetch(self.dataset, indices)
            batch = self.collator(samples)
        complete = len(wanted.geometries) == len(indices)
        return DrawnBatch(batch, torch.stack(wanted.geometries) if complete else None, wanted.refused)

    def collate(self, indices: Sequence[int], view: int = 0) -> Mapping[str, Any]:
        """A view of some samples as a batch."""
        return self.draw(indices, view).batch

    def probe(self, rows: int = 2) -> Mapping[str, Any]:
        """A batch of the first rows."""
        return self.collate(range(min(rows, len(self))))

    def loader(
        self, batches: Sequence[int], views: int = 0, geometry: tuple[str, tuple[int, int]] | None = None
    ) -> Iterator[tuple[int, list[DrawnBatch]]]:
        """Yields `(number, views)` for the given ranges, in order, the base view first; the global generators stay
        untouched.
        """
        loader = DataLoader(
            _Ranges(self, views, geometry),
            batch_size=None,
            sampler=batches,
            num_workers=self.num_workers if len(batches) > 1 else 0,
            multiprocessing_context=self.multiprocessing_context if self.num_workers and len(batches) > 1 else None,
            generator=torch.Generator().manual_seed(self.seed),
        )
        yield from zip(batches, loader, strict=True)


class ChosenRows(RowSource):
    """Some rows of another source alone, in ranges of its size.

    Args:
        source: the samples.
        chosen: row numbers.
    """

    def __init__(self, source: RowSource, chosen: Sequence[int]):
        super().__init__(
            source.dataset,
            source.collator,
            source.batch_size,
            source.seed,
            source.num_workers,
            source.multiprocessing_context,
        )
        self.chosen = list(chosen)

    def __len__(self) -> int:
        return len(self.chosen)

    def rows(self, batch: int) -> list[int]:
        return self.chosen[batch * self.batch_size : (batch + 1) * self.batch_size]


class _Ranges(TorchDataset):
    def __init__(self, source: RowSource, views: int, geometry: tuple[str, tuple[int, int]] | None):
        self.source, self.views, self.geometry = source, views, geometry

    def __len__(self) -> int:
        return self.source.num_ranges

    def __getitem__(self, batch: int) -> list[DrawnBatch]:
        rows = self.source.rows(batch)
        # The geometry of the base view is the identity; nobody asks for it.
        return [self.source.draw(rows, view, self.geometry if view else None) for view in range(self.views + 1)]


def is_same(first: Any, second: Any) -> bool:
    """Whether two batches, or parts of them, hold the same values."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second)
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(is_same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(is_same(a, b) for a, b in zip(first, second, strict=True))
    return first == second


def check_dataset(dataset: Any) -> None:
    """Raises ValueError, saying why, if the rows of a data set cannot be cached."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"the train data set ({type(dataset).__name__}) is iterable: rows are cached by their index, so it must "
            "be map-style (`__len__` and `__getitem__`)."
        )
    if len(dataset) == 0:
        raise ValueError("the train data set is empty: there is nothing to train on.")
