"""The user's samples as model inputs: fetching, collating, and splitting a batch into its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset
from torch.utils.data import Dataset as TorchDataset

from ..augment.draws import Draw, use_draw
from ..model.stand_ins import stays_real
from ..model.tokens import TextInputs
from ..rng import seeded_rng
from .names import is_reserved

if TYPE_CHECKING:
    from .padded import PaddingRule
    from .sized import SizeRule

#: torch dtype of a column -> NumPy type in which Arrow stores it.
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
#: What the `dtype` of an `InputColumn` may be: names of dtypes, and kinds of values of a list.
TENSOR_KINDS = frozenset(str(dtype).removeprefix("torch.") for dtype in _STORED_AS)
LIST_KINDS = frozenset({"str", "int", "float", "bool"})


class RowError(ValueError):
    """An entry of the collator's batch cannot be stored per row; the message names it and the reason."""


@dataclass(frozen=True)
class InputColumn:
    """One entry of a collated batch that is stored per row: a tensor `(B, *shape)`, or a list of strings or numbers.

    Args:
        dtype: name of the torch dtype (`int64`), or `str`, `int`, `float`, `bool` for a list.
        shape: shape of a row of a tensor.
        is_list: whether the entry is a list.

    Shapes: B samples.
    """

    dtype: str
    shape: tuple[int, ...] = ()
    is_list: bool = False

    @property
    def stored_as(self) -> str:
        """NumPy type in which Arrow stores a tensor entry."""
        return _STORED_AS[getattr(torch, self.dtype)]

    def to_numpy(self, value: torch.Tensor) -> np.ndarray:
        """Turns a tensor `(B, *shape)` into the array `(B, n)` that is stored, n values a row."""
        flat = value.detach().cpu().reshape(len(value), -1)
        if flat.dtype == torch.bfloat16:
            flat = flat.float()
        if flat.dtype == torch.bool:
            flat = flat.to(torch.uint8)
        return flat.contiguous().numpy()

    def to_tensor(self, rows: np.ndarray) -> torch.Tensor:
        """Turns a stored array `(B, n)` back into a tensor `(B, *shape)`."""
        return torch.from_numpy(rows).to(getattr(torch, self.dtype)).reshape(len(rows), *self.shape)


@dataclass(frozen=True)
class BatchSplit:
    """A collated batch in three parts.

    Args:
        main: the main input, `(B, ...)`.
        columns: entries with one value per sample, by name; the main input too if it holds tokens.
        constants: entries that are the same for every batch, by name.
        mask: where the tokens of texts are that are stored without padding, as `token_mask` tells; else None.

    Shapes: B samples.
    """

    main: torch.Tensor
    columns: dict[str, Any]
    constants: dict[str, Any]
    mask: torch.Tensor | None = None

    def describe(self) -> dict[str, InputColumn]:
        """Shape and dtype of every entry that has one value per sample."""
        columns = {}
        for name, value in self.columns.items():
            if isinstance(value, torch.Tensor):
                columns[name] = InputColumn(str(value.dtype).removeprefix("torch."), tuple(value.shape[1:]))
            else:
                columns[name] = InputColumn(type(value[0]).__name__, is_list=True)
        return columns


def split_batch(batch: Mapping[str, Any], main_input: str) -> BatchSplit:
    """Splits a collated batch into main input, entries per sample and constants.

    Args:
        batch: as the collator returned it.
        main_input: name of the main input.

    Raises:
        RowError: if the main input is missing, an entry has the name of a store's own column, or an entry neither has
            one value per sample nor is a plain constant.
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get(main_input), torch.Tensor):
        got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise RowError(
            f"the data collator must return a dict with the tensor '{main_input}'; it returned {got}. cache='never' "
            "freezes without features."
        )
    main = batch[main_input]
    clashing = sorted(name for name in batch if is_reserved(name))
    if clashing:
        raise RowError(f"the collator's {clashing} clash with a store's columns: rename them.")
    columns: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    for name, value in batch.items():
        if name == main_input and not stays_real(main):
            continue
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == len(main):
            if value.dtype not in _STORED_AS:
                raise RowError(f"the collator's '{name}' has dtype {value.dtype}, which a store cannot hold.")
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
    """Reads samples as a `DataLoader` does before it calls the collator.

    Args:
        dataset: map-style data set.
        indices: row numbers.
    """
    if getattr(dataset, "__getitems__", None):
        return dataset.__getitems__(list(indices))
    return [dataset[index] for index in indices]


def without_last(batch: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """A collated batch without its last sample; entries without one value per sample as they are.

    Args:
        batch: of a few samples.
        samples: their number, more than one.
    """

    def drop(value: Any) -> Any:
        is_rows = value.ndim > 0 if isinstance(value, torch.Tensor) else isinstance(value, (list, tuple))
        return value[:-1] if is_rows and len(value) == samples else value

    return {name: drop(value) for name, value in batch.items()}


def repeated(batch: Mapping[str, Any], times: int) -> dict[str, Any]:
    """A collated batch of one sample as one of the same sample several times; other entries as they are.

    Args:
        batch: of one sample.
        times: how often.
    """

    def repeat(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == 1:
            return value[[0] * times]
        return list(value) * times if isinstance(value, (list, tuple)) and len(value) == 1 else value

    return {name: repeat(value) for name, value in batch.items()}


@dataclass(frozen=True)
class DrawnBatch:
    """One view of a few samples.

    Args:
        batch: as the collator returned it.
        geometry: the views' geometry `(B, G)`; None if it was not requested or no transform returned it.
        refused: why a replayable transform could not return it; None if it could.

    Shapes: B samples, G numbers of a view's geometry.
    """

    batch: Mapping[str, Any]
    geometry: torch.Tensor | None = None
    refused: str | None = None


class RowSource:
    """A map-style data set with its collator, read in ranges: slices of `batch_size` rows that never change.

    The random numbers for a view of a sample depend on the seed, the sample and the view where a
    `ReplayableTransform` draws them. Any other transform or collator gets random numbers that depend on the seed, the
    first row of the range and the view.

    Args:
        dataset: the user's data set, transform included.
        collator: the user's collator.
        batch_size: number of rows of a range; the last range may be shorter.
        seed: of the training.
        num_workers: number of processes that load ahead.
        multiprocessing_context: how they are started, as for a `DataLoader`.
        texts: what the frozen blocks read, where samples are texts.

    Attributes:
        probe_rows: rows that stand for all; None: the first ones.
        wide: the same samples as stores hold them where they are not of one width: each batch as wide as the widest
            of all, or samples of equal size together; None: nobody has looked for it.
        rule: of such a source, how its collator pads, or what is read of samples that have sizes of their own; else
            None.
        is_padded: whether the collator pads samples to the longest of a batch; None: nobody has looked.
        sizes: rows by the size of their main input, see `rows_by_size`; None: nobody has looked.
        sampled: rows as the training's sampler draws them in an epoch, some again or never; None: each as often as
            any other, or nobody has asked it.
        drawn_as: for every row the number from which its random numbers follow; None: its own.
        combined: why samples depend on the others that are fetched with them, see `find_combined`; empty if they do
            not; None: nobody has looked.
    """

    def __init__(
        self,
        dataset: Any,
        collator: Callable,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        multiprocessing_context: Any = None,
        texts: TextInputs | None = None,
    ):
        self.texts = TextInputs("input_ids", frozenset({"input_ids"})) if texts is None else texts
        self.probe_rows: Sequence[int] | None = None
        self.wide: RowSource | None = None
        self.rule: PaddingRule | SizeRule | None = None
        self.is_padded: bool | None = None
        self.sizes: Sequence[Sequence[int]] | None = None
        self.sampled: Sequence[int] | None = None
        self.drawn_as: Sequence[int] | None = None
        self.combined: str | None = None
        self.dataset, self.collator, self.batch_size, self.seed = dataset, collator, batch_size, seed
        self.num_workers, self.multiprocessing_context = num_workers, multiprocessing_context

    def __len__(self) -> int:
        return len(self.dataset)

    def collated_by(self, collator: Callable) -> RowSource:
        """The same samples with another collator."""
        other = self._reading(self.dataset, collator)
        other.probe_rows, other.drawn_as = self.probe_rows, self.drawn_as
        return other

    def chosen(self, numbers: Sequence[int]) -> RowSource:
        """Some of the samples, numbered by their places; what is drawn for each follows from its number here.

        Args:
            numbers: rows of this source.
        """
        other = self._reading(Subset(self.dataset, numbers), self.collator)
        other.is_padded, other.drawn_as = self.is_padded, numbers
        return other

    def _reading(self, dataset: Any, collator: Callable) -> RowSource:
        workers, context = self.num_workers, self.multiprocessing_context
        other = RowSource(dataset, collator, self.batch_size, self.seed, workers, context, self.texts)
        other.combined = self.combined
        return other

    @property
    def num_ranges(self) -> int:
        """Number of ranges."""
        return -(-len(self) // self.batch_size)

    def rows(self, number: int) -> Sequence[int]:
        """Row numbers of a range.

        Args:
            number: of the range, from 0.
        """
        return range(number * self.batch_size, min((number + 1) * self.batch_size, len(self)))

    def draw(
        self,
        indices: Sequence[int],
        view: int = 0,
        geometry: tuple[str, tuple[int, int]] | None = None,
        again: int = 0,
    ) -> DrawnBatch:
        """Draws a view of some samples and collates them.

        Args:
            indices: row numbers.
            view: number of the view. A `ReplayableTransform` gives the base view for 0; any other transform draws for
                0 as for every other number.
            geometry: kind and feature grid of the geometry that is requested; None: no geometry is.
            again: another number draws again what is random besides a `ReplayableTransform`.
        """
        numbers = indices if self.drawn_as is None else [self.drawn_as[index] for index in indices]
        draw = Draw(self.seed, numbers, view=view, geometry=geometry)
        with seeded_rng(self.seed, numbers[0], view, *([again] if again else [])):
            with use_draw(draw):
                samples = fetch(self.dataset, indices)
            batch = self.collator(samples)
        complete = len(draw.geometries) == len(indices)
        return DrawnBatch(batch, torch.stack(draw.geometries) if complete else None, draw.refused)

    def collate(self, indices: Sequence[int], view: int = 0) -> Mapping[str, Any]:
        """The batch of a view of some samples; see `draw`."""
        return self.draw(indices, view).batch

    def probe(self, rows: int = 2) -> Mapping[str, Any]:
        """The base view of a few rows as a batch; where batches are one sample of any size, of one row, repeated."""
        chosen = range(min(rows, len(self))) if self.probe_rows is None else self.probe_rows[:rows]
        if self.sizes and self.batch_size == 1:
            return repeated(self.collate(chosen[:1]), rows)
        return self.collate(chosen)

    def loader(
        self, numbers: Sequence[int], views: int = 0, geometry: tuple[str, tuple[int, int]] | None = None
    ) -> Iterator[tuple[int, list[DrawnBatch]]]:
        """Draws every view of some ranges; leaves the global random generators unchanged.

        Args:
            numbers: of the ranges.
            views: number of augmented views beside the base view.
            geometry: kind and feature grid of the views' geometry; None: no geometry is requested.

        Yields:
            The number of a range and its views, the base view first, in the order of `numbers`.
        """
        loader = DataLoader(
            _Ranges(self, views, geometry),
            batch_size=None,
            sampler=numbers,
            num_workers=self.num_workers if len(numbers) > 1 else 0,
            multiprocessing_context=self.multiprocessing_context if self.num_workers and len(numbers) > 1 else None,
            generator=torch.Generator().manual_seed(self.seed),
        )
        yield from zip(numbers, loader, strict=True)


class ChosenRows(RowSource):
    """Some rows of another source, in ranges of the same size.

    Args:
        source: the other source.
        row_numbers: rows of it, in the order in which they are read.
    """

    def __init__(self, source: RowSource, row_numbers: Sequence[int]):
        super().__init__(
            source.dataset,
            source.collator,
            source.batch_size,
            source.seed,
            source.num_workers,
            source.multiprocessing_context,
            source.texts,
        )
        self.rule, self.drawn_as, self.combined = source.rule, source.drawn_as, source.combined
        self._row_numbers = list(row_numbers)

    def __len__(self) -> int:
        return len(self._row_numbers)

    def rows(self, number: int) -> list[int]:
        return self._row_numbers[number * self.batch_size : (number + 1) * self.batch_size]


class _Ranges(TorchDataset):
    """The ranges of a source as a data set, each with all its views."""

    def __init__(self, source: RowSource, views: int, geometry: tuple[str, tuple[int, int]] | None):
        self.source, self.views, self.geometry = source, views, geometry

    def __len__(self) -> int:
        return self.source.num_ranges

    def __getitem__(self, number: int) -> list[DrawnBatch]:
        rows = self.source.rows(number)
        # The geometry of the base view is the identity and is never stored.
        return [self.source.draw(rows, view, self.geometry if view else None) for view in range(self.views + 1)]


def is_same(first: Any, second: Any) -> bool:
    """Whether two batches, or parts of two batches, hold the same values; NaN is the same as NaN."""
    if isinstance(first, torch.Tensor):
        if not isinstance(second, torch.Tensor) or first.shape != second.shape or first.dtype != second.dtype:
            return False
        if torch.equal(first, second):
            return True
        return (
            first.is_floating_point()
            and torch.equal(first.isnan(), second.isnan())
            and torch.equal(first.nan_to_num(0), second.nan_to_num(0))
        )
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second, equal_nan=first.dtype.kind in "fc")
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(is_same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(is_same(a, b) for a, b in zip(first, second, strict=True))
    return first == second or (first != first and second != second)


def check_dataset(dataset: Any) -> None:
    """Checks that the rows of a data set can be cached.

    Raises:
        ValueError: if the data set is not map-style, or is empty.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"the train data set ({type(dataset).__name__}) is iterable: rows are cached by their index, so it must "
            "be map-style (`__len__` and `__getitem__`)."
        )
    if len(dataset) == 0:
        raise ValueError("the train data set is empty: there is nothing to train on.")
