"""Some rows of a data set, in another order, as the training reads them."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, RandomSampler, SequentialSampler
from transformers.trainer_utils import has_length

from ..cache.installed import package_of
from ..cache.rows import RowSource, fetch
from ..cache.sized import size_of
from ..cache.store import FeatureStore
from ..distributed import Group
from ..replay.collator import ReplayCollator
from ..replay.dataset import BatchRows, CachedRows
from ..replay.requests import RequestedRow, RowOrigin, sampler_of
from ..rng import preserve_rng
from .data_state import undisturbed

#: Packages whose samplers, beside those of torch, draw each row as often as any other.
_FAIR_PACKAGES = ("transformers", "accelerate")


def in_random_order(source: RowSource, group: Group) -> list[int]:
    """This process's share of the rows that the training draws, in an order that depends on its seed alone.

    Args:
        source: of all rows; those that count, and how often, are `source.sampled`.
        group: the processes; all get as many rows.
    """
    return _deal(_shuffled(source), group)


def of_node_in_random_order(source: RowSource, group: Group, disk: Group, stored: np.ndarray) -> list[int]:
    """This process's share of the rows that its node stores, in the order of `in_random_order`.

    Args:
        source: of all rows.
        group: the processes; all get as many rows, so that what a node has more than another one is left out.
        disk: those of this node.
        stored: numbers of the rows that it stores, `(N,)`.
    """
    own = set(stored.tolist())
    mine = _deal([row for row in _shuffled(source) if row in own], disk)
    return mine[: min(group.gather(len(mine)))]


def _shuffled(source: RowSource) -> list[int]:
    count = len(source) if source.sampled is None else len(source.sampled)
    places = torch.randperm(count, generator=torch.Generator().manual_seed(source.seed)).tolist()
    return places if source.sampled is None else [source.sampled[place] for place in places]


class SamplerError(ValueError):
    """Nobody can tell which rows a sampler draws without disturbing it."""


def ask_sampler(loader: Any, rows: int) -> list[int] | None:
    """The rows that a loader's sampler draws in an epoch; it goes on from where it was.

    Args:
        loader: of the training, wrapped by accelerate or not.
        rows: of the data set.

    Returns:
        Their numbers, in the order in which one epoch may draw them; None for samplers of torch, Transformers and
        accelerate that draw each row as often as any other.

    Raises:
        SamplerError: if it yields something else, or has a state that cannot be put back.
    """
    sampler: Any = sampler_of(loader)
    kind = type(sampler).__name__
    if type(sampler) in (RandomSampler, SequentialSampler) or package_of(type(sampler).__module__) in _FAIR_PACKAGES:
        return None
    if sampler is None:
        raise SamplerError("the loader has no sampler")
    length = len(sampler) if has_length(sampler) else None
    if length is None:
        raise SamplerError(f"{kind} has no length")
    with preserve_rng(), undisturbed(sampler) as is_known:
        if not is_known:
            raise SamplerError(f"{kind} has a state that cannot be put back")
        drawn = list(itertools.islice(sampler, length))
    numbers = [row for each in drawn for row in (each if isinstance(each, (list, tuple)) else [each])]
    try:
        numbers = [operator.index(row) for row in numbers]
    except TypeError as error:
        raise SamplerError(f"{kind} draws something else than numbers of rows") from error
    if not numbers or not 0 <= min(numbers) <= max(numbers) < rows:
        raise SamplerError(f"{kind} draws {'other rows than those of the data set' if numbers else 'nothing'}")
    return numbers


def _deal(rows: list[int], group: Group) -> list[int]:
    return rows[group.rank :: group.size][: len(rows) // group.size]


def of_rows(source: RowSource, rows: Sequence[int]) -> RowSource:
    """The same data set with these rows only, in this order.

    Args:
        source: of all rows.
        rows: their numbers.
    """
    return RowSource(
        _Reordered(source.dataset, rows),
        source.collator,
        batch_size=source.batch_size,
        seed=source.seed,
        num_workers=source.num_workers,
        multiprocessing_context=source.multiprocessing_context,
        texts=source.texts,
    )


def in_batches(source: RowSource, rows: Sequence[int], main_input: str) -> list[Sequence[int]]:
    """Rows in batches of the size of the training's, as they come; of several sizes, those of one size together.

    Args:
        source: of all rows. Where its samples have several sizes, as `rows_by_size` has found, each is read for it.
        rows: numbers of some.
        main_input: name of the model's main input in a batch.
    """
    size = source.batch_size
    if not source.sizes or size == 1:
        return [rows[first : first + size] for first in range(0, len(rows), size)]
    batches: list[Sequence[int]] = []
    open_ones: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        own = open_ones.setdefault(size_of(source.collate([row]), main_input), [])
        own.append(row)
        if len(own) == size:
            batches.append(own.copy())
            own.clear()
    return [*batches, *filter(None, open_ones.values())]


def of_batches(source: RowSource, batches: Sequence[Sequence[int]], store: FeatureStore | None = None) -> RowSource:
    """The same data set with these batches only, each a range, in this order.

    Args:
        source: of all rows.
        batches: numbers of their rows.
        store: from which their base views are read, as a replay epoch reads rows; None: they are samples.
    """
    rows = [row for batch in batches for row in batch]
    if store is None:
        return _Batches(source, _Reordered(source.dataset, rows), source.collator, batches)
    return _Batches(source, _Stored(source, store, rows), ReplayCollator(source.collator), batches)


class _Batches(RowSource):
    def __init__(self, source: RowSource, dataset: Any, collator: Any, batches: Sequence[Sequence[int]]):
        super().__init__(
            dataset,
            collator,
            batch_size=source.batch_size,
            seed=source.seed,
            num_workers=source.num_workers,
            multiprocessing_context=source.multiprocessing_context,
            texts=source.texts,
        )
        self._ends = [0, *itertools.accumulate(map(len, batches))]

    @property
    def num_ranges(self) -> int:
        return len(self._ends) - 1

    def rows(self, number: int) -> Sequence[int]:
        return range(self._ends[number], self._ends[number + 1])


class _Reordered(Dataset):
    def __init__(self, dataset: Any, rows: Sequence[int]):
        self.dataset, self.numbers = dataset, rows

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, row: int) -> Any:
        return self.dataset[self.numbers[row]]

    def __getitems__(self, rows: Sequence[int]) -> Any:
        return fetch(self.dataset, [self.numbers[row] for row in rows])


class _Stored(_Reordered):
    """Rows of a store, of which the user's collator gets the samples, too, where replay epochs need these."""

    def __init__(self, source: RowSource, store: FeatureStore, rows: Sequence[int]):
        super().__init__(source.dataset, rows)
        self.store, self.texts = store, source.texts

    def __getitem__(self, row: int) -> Any:
        return self.__getitems__([row])

    def __getitems__(self, rows: Sequence[int]) -> Any:
        layout, origin = self.store.codec.layout, RowOrigin(store=self.store.path)
        entries = self.store.read_rows([self.numbers[row] for row in rows])
        named = BatchRows.of([RequestedRow(self.numbers[row], origin) for row in rows])
        samples = super().__getitems__(rows) if layout.is_token or layout.is_trimmed else None
        return CachedRows(entries, self.store.code_names(entries), named, samples, self.texts)
