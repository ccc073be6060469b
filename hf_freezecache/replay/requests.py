"""The rows that a training asks for: numbers that say where their rows come from.

The sampler of the training's loader is replaced by one that yields the same numbers and stamps each: the source of the
running epoch, and how often the row was drawn in it before. The stamp travels with the number through batch samplers
and into loader processes, so that a row's source is known wherever it is read, however far ahead. Numbers of an
iteration that anybody else begins have no stamp; their rows are the user's own.
"""

from __future__ import annotations

import contextlib
import operator
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from torch.utils.data import BatchSampler

from ..cache.store import StoreHandle
from ..rng import hash_key
from .node_order import Dealing, Filler


def store_number(path: Path | None) -> int:
    """A number for a store, to tell batches of one from those of another: 63 bits; 0 for samples."""
    return 0 if path is None else hash_key("store", str(path.absolute())) >> 1


@dataclass(frozen=True)
class WriteRound:
    """A live epoch whose features are stored: every sample is drawn as one of its views.

    Args:
        number: of the round, from 0.
        views: number of augmented views beside the base view. In `views + 1` rounds every sample is drawn once as each
            of its views.
        geometry: kind and feature grid of the views' geometry; None: no geometry is requested.
    """

    number: int
    views: int
    geometry: tuple[str, tuple[int, int]] | None = None


@dataclass(frozen=True)
class RowOrigin:
    """Where rows come from: a store, or samples, drawn as views of a round or as live samples.

    Args:
        epoch: of the training, from 0.
        store: path of the store; None: samples.
        round: of an epoch that is stored; None in all others.
        handle: what loader processes open the store with, whatever has happened to its path; None: by its path.
    """

    epoch: int = 0
    store: Path | None = None
    round: WriteRound | None = None
    handle: StoreHandle | None = None

    @cached_property
    def store_number(self) -> int:
        """Tells batches of one store from those of another: 63 bits; 0 for samples."""
        return store_number(self.store)


class RequestedRow(int):
    """A row number that the training asks for.

    Args:
        index: the number as the user's sampler yielded it; the user's data set gets it so.
        origin: where the row comes from.
        occurrence: how often the row was drawn in this epoch before.
    """

    index: Any
    origin: RowOrigin
    occurrence: int

    def __new__(cls, index: Any, origin: RowOrigin, occurrence: int = 0) -> RequestedRow:
        row = super().__new__(cls, operator.index(index))
        row.index, row.origin, row.occurrence = index, origin, occurrence
        return row

    def __reduce__(self) -> tuple:
        return RequestedRow, (self.index, self.origin, self.occurrence)


def requested(indices: Sequence[Any]) -> list[RequestedRow] | None:
    """The rows of one batch, all of one origin; None if nobody but the user asks for them.

    A batch that spans two origins, as of an iteration that goes on from one epoch into the next, is drawn live.
    """
    rows = [index for index in indices if isinstance(index, RequestedRow)]
    if not rows or len(rows) != len(indices):
        return None
    last = rows[-1].origin
    if all(row.origin == last for row in rows):
        return rows
    return [RequestedRow(row.index, RowOrigin(last.epoch), row.occurrence) for row in rows]


@dataclass(frozen=True)
class Trial:
    """Batches that show what becomes of features on the way from the data set to the training.

    Args:
        rows: of a batch, as the data set returns them.
        size: number of rows of a batch.
        batches: number of batches.
    """

    rows: Any
    size: int
    batches: int

    def numbers(self, in_batches: bool) -> Iterator[Any]:
        """What a sampler, or a batch sampler, yields for them."""
        batch = [RequestedRow(number, RowOrigin()) for number in range(self.size)]
        return iter([batch] * self.batches if in_batches else batch * self.batches)


class SourceSwitch:
    """The source of an epoch's rows, and a count of the rows that the epoch has asked for.

    Args:
        rows: of the data set.

    Attributes:
        origin: where the rows come from that are asked for now.
        trial: what every iteration yields in place of the sampler's rows; None outside a trial.
        dealing: which node reads which rows, where each stores its share; None: every process may read all.
    """

    def __init__(self, rows: int):
        self.origin = RowOrigin()
        self.dealing: Dealing | None = None
        self.trial: Trial | None = None
        self._drawn = array("L", [0]) * rows
        self._asks, self._once = False, False

    @property
    def epoch(self) -> int:
        """The running epoch. Setting it begins the epoch: no row was drawn in it yet."""
        return self.origin.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self.origin = replace(self.origin, epoch=epoch)
        self._drawn = array("L", [0]) * len(self._drawn)

    @property
    def path(self) -> Path | None:
        """Path of the store that is replayed; None in live epochs, also in those that are stored."""
        return self.origin.store

    @property
    def round(self) -> WriteRound | None:
        """The round of a live epoch that is stored; None in all other epochs."""
        return self.origin.round

    def set(self, path: Path | None, handle: StoreHandle | None = None) -> None:
        """Sets the source: a store, or samples. Rows that are asked for from now on come from it.

        Args:
            path: of the store; None: samples.
            handle: what loader processes open the store with; None: they open it by its path.
        """
        self.origin = RowOrigin(self.epoch, None if path is None else path.absolute(), handle=handle)

    def write(self, write_round: WriteRound) -> None:
        """Sets the source: samples drawn as views of a round. Rows that are asked for from now on come from it."""
        self.origin = RowOrigin(self.epoch, None, write_round)

    @contextlib.contextmanager
    def trying(self, trial: Trial) -> Iterator[None]:
        """Inside, every iteration yields the trial; samplers do not notice."""
        self.trial = trial
        try:
            yield
        finally:
            self.trial = None

    @contextlib.contextmanager
    def requesting(self, once: bool = False) -> Iterator[None]:
        """Inside, iterations over the loader that begin are those of the training (or of an evaluation).

        Args:
            once: only the first of them.
        """
        before = self._asks, self._once
        self._asks, self._once = True, once
        try:
            yield
        finally:
            self._asks, self._once = before

    def begins(self) -> bool:
        """Whether an iteration that begins now is the training's."""
        asks = self._asks
        if self._once:
            self._asks = False
        return asks

    def ordered(self, drawn: Iterator[Any]) -> Iterator[Any]:
        """What a sampler draws for an epoch of the training, in the order in which this process's node reads it.

        Args:
            drawn: rows as the sampler draws them.

        Raises:
            OrderError: where nodes store shares, if it does not draw every row once.
        """
        handle = self.origin.handle
        if self.dealing is None or handle is None or handle.share is None:
            return drawn
        return self.dealing.order(list(drawn), handle.share.places())

    def stamp(self, index: Any) -> Any:
        """Stamps what a sampler yields: a row number, or a list of them. Anything else stays as it is."""
        if isinstance(index, Filler):
            return RequestedRow(int(index), self.origin)  # as the row that fills up a batch: it is not drawn again
        if isinstance(index, (list, tuple)):
            return [self.stamp(one) for one in index]
        try:
            row = operator.index(index)
        except TypeError:
            return index
        if not 0 <= row < len(self._drawn):
            return index
        occurrence = self._drawn[row]
        self._drawn[row] += 1
        return RequestedRow(index, self.origin, occurrence)


def stamp_rows(loader: Any, switch: SourceSwitch) -> None:
    """Lets a loader's innermost sampler stamp the rows of the training's iterations.

    Args:
        loader: a `DataLoader` of a map-style data set, wrapped by accelerate or not.
        switch: the source of the rows.
    """
    holder, name = _innermost(loader)
    if holder is None:
        return
    sampler = StampingSampler(getattr(holder, name), switch)
    # A `DataLoader` refuses to set its batch sampler, in which others could hide; this one yields the same batches.
    object.__setattr__(holder, name, sampler)


def find_switch(loader: Any) -> SourceSwitch | None:
    """The switch that stamps a loader's rows; None if none does."""
    holder, name = _innermost(loader)
    sampler = getattr(holder, name, None)
    return sampler._switch if type(sampler) is StampingSampler else None


def sampler_of(loader: Any) -> Any:
    """A loader's innermost sampler, or batch sampler without one; None if there is none."""
    holder, name = _innermost(loader)
    sampler = getattr(holder, name, None)
    return sampler._sampler if type(sampler) is StampingSampler else sampler


def _innermost(loader: Any) -> tuple[Any, str]:
    """The object that holds the innermost sampler, and the name of its attribute; (None, "") if there is none.

    It descends through batch samplers that are known to yield what the inner one yields. Any other one, which may make
    its numbers itself, is innermost.
    """
    holder, name = getattr(loader, "base_dataloader", loader), "batch_sampler"
    if getattr(holder, name, None) is None:
        return None, ""
    while True:
        sampler = getattr(holder, name)
        if type(sampler) is BatchSampler:
            return sampler, "sampler"
        if not isinstance(sampler, (BatchSamplerShard, SkipBatchSampler)):
            return holder, name
        holder = sampler


class StampingSampler:
    """A sampler in another one's place. It yields what that one yields, and is that one to whoever asks.

    Args:
        sampler: a sampler, or a batch sampler without one.
        switch: stamps the rows.
    """

    _sampler: Any
    _switch: SourceSwitch

    def __init__(self, sampler: Any, switch: SourceSwitch):
        object.__setattr__(self, "_sampler", sampler)
        object.__setattr__(self, "_switch", switch)

    def __iter__(self) -> Iterator[Any]:
        if self._switch.trial is not None:
            return self._switch.trial.numbers(in_batches=isinstance(self._sampler, BatchSampler))
        # Not a generator: whose iteration it is counts when it begins.
        iterator = iter(self._sampler)
        return _Stamping(self._switch.ordered(iterator), self._switch) if self._switch.begins() else iterator

    def __len__(self) -> int:
        return len(self._sampler)

    @property  # type: ignore[misc]  # accelerate asks which sampler it is
    def __class__(self) -> type:
        return type(self._sampler)

    def __getattr__(self, name: str) -> Any:
        if name in ("_sampler", "_switch"):
            raise AttributeError(name)
        return getattr(self._sampler, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._sampler, name, value)

    def __reduce__(self) -> tuple:
        return StampingSampler, (self._sampler, self._switch)


class _Stamping:
    """An iterator that stamps what another one yields. Loaders with a state ask that one for it."""

    def __init__(self, iterator: Iterator[Any], switch: SourceSwitch):
        self._iterator, self._switch = iterator, switch

    def __iter__(self) -> _Stamping:
        return self

    def __next__(self) -> Any:
        return self._switch.stamp(next(self._iterator))

    def __getattr__(self, name: str) -> Any:
        if name == "_iterator":
            raise AttributeError(name)
        return getattr(self._iterator, name)
