"""The wrapped data set, whose rows come from samples or from a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from ..augment.draws import Draw, use_draw
from ..augment.geometry import geometry_column
from ..cache.manifest import StoreError
from ..cache.rows import RowSource, fetch
from ..cache.selections import selection_of
from ..cache.store import FeatureStore, StoreHandle
from ..model.tokens import TextInputs
from ..rng import hash_key, seeded_rng
from .requests import RequestedRow, RowOrigin, SourceSwitch, WriteRound, requested


@dataclass(frozen=True)
class BatchRows:
    """The rows of a batch, as the training has asked for them.

    Args:
        table: int64 `(B, 4)`, one tensor as it travels with the batch: what the properties name.

    Shapes: B samples.
    """

    table: torch.Tensor

    @property
    def numbers(self) -> torch.Tensor:
        """Row numbers, int64 `(B,)`."""
        return self.table[:, 0]

    @property
    def occurrences(self) -> torch.Tensor:
        """How often each row was drawn in its epoch before, int64 `(B,)`."""
        return self.table[:, 1]

    @property
    def epochs(self) -> torch.Tensor:
        """Epochs of the training, int64 `(B,)`."""
        return self.table[:, 2]

    @property
    def stores(self) -> torch.Tensor:
        """`store_number` of the store that they come from, 0 for samples, int64 `(B,)`."""
        return self.table[:, 3]

    @classmethod
    def of(cls, rows: Sequence[RequestedRow]) -> BatchRows:
        """Those of some requested rows."""
        columns = [(int(row), row.occurrence, row.origin.epoch, row.origin.store_number) for row in rows]
        return cls(torch.tensor(columns, dtype=torch.int64).reshape(-1, 4))

    @classmethod
    def merge(cls, parts: Sequence[BatchRows]) -> BatchRows:
        """Joins the rows of several batches."""
        return cls(torch.cat([part.table for part in parts]))


@dataclass(frozen=True)
class CachedRows:
    """Rows of a store, before collating.

    Args:
        rows: codes and model inputs by name, as `FeatureStore.read_rows` returned them.
        codes: names of the codes among them.
        requested: which rows they are.
        samples: where the user's collator pads them in every epoch, the samples for it; else None.
        texts: what the frozen blocks read of texts, if there are samples for the user's collator; else None.
    """

    rows: dict[str, Any]
    codes: tuple[str, ...]
    requested: BatchRows
    samples: Any = None
    texts: TextInputs | None = None


@dataclass(frozen=True)
class LostRows:
    """Rows of a store that cannot be read any more.

    Args:
        requested: which rows they are.
        why: why, as a sentence.
    """

    requested: BatchRows
    why: str


@dataclass(frozen=True)
class DrawnRows:
    """Live samples of a `WriteRound`, before collating.

    Args:
        samples: the samples for the user's collator.
        requested: which rows they are.
        views: view of each sample, int64 `(B,)`.
        geometry: the views' geometry `(B, G)`, zeros for base views; None if it was not requested or no transform
            returned it.
        refused: why a replayable transform could not return it; None if it could.
        key: seed of the random numbers of the user's collator, see `seeded_rng`.

    Shapes: B samples, G numbers of a view's geometry.
    """

    samples: Any
    requested: BatchRows
    views: torch.Tensor
    geometry: torch.Tensor | None
    refused: str | None
    key: tuple[int | str, ...]


def rotate_views(
    seed: int, write_round: WriteRound, samples: Sequence[int], occurrences: Sequence[int] | None = None
) -> np.ndarray:
    """The view as which each sample is drawn in a round. As in replay, every round has base and augmented views.

    Args:
        seed: of the training.
        write_round: the round. In `views + 1` rounds every sample gets each of its views once.
        samples: row numbers, B of them.
        occurrences: how often each was drawn in this round before; None: never.

    Returns:
        int64 `(B,)`, from 0 to `write_round.views`.
    """
    return _in_turn("write", seed, write_round.number, samples, occurrences, write_round.views)


def choose_views(
    seed: int, epoch: int, samples: Sequence[int], views: int, occurrences: Sequence[int] | None = None
) -> np.ndarray:
    """The view that each sample gets in a replay epoch: its views in turn, beginning with another one for each sample.

    It depends on the seed, the sample, the epoch and the occurrence within the epoch, and on nothing else.

    Args:
        seed: of the training.
        epoch: of the training, from 0.
        samples: row numbers, B of them.
        views: number of augmented views in the store.
        occurrences: how often each was drawn in this epoch before; None: never.

    Returns:
        int64 `(B,)`, from 0 to `views`.
    """
    return _in_turn("replay", seed, epoch, samples, occurrences, views)


def _in_turn(
    kind: str, seed: int, turn: int, samples: Sequence[int], occurrences: Sequence[int] | None, views: int
) -> np.ndarray:
    if not views:
        return np.zeros(len(samples), np.int64)
    times = [0] * len(samples) if occurrences is None else occurrences
    chosen = [
        (hash_key(kind, seed, sample) + turn + time) % (views + 1) for sample, time in zip(samples, times, strict=True)
    ]
    return np.array(chosen, dtype=np.int64)


class ReplayDataset(Dataset):
    """Wraps the user's map-style data set for a training. Its length and the order of its samples never change.

    Rows that the training asks for come from where their request says. Rows that anybody else asks for are the user's
    own, with random numbers from the global generators.

    Args:
        inner: the user's data set.
        switch: what stamps the rows that the training asks for; loader processes have no use for it.
        seed: of the training. What a replayable transform draws, and which view is replayed, depend on it, the epoch,
            the sample and its occurrence in the epoch.
        texts: what the frozen blocks read of texts; stores of these alone need it.
        together: whether functions of rows get whole batches in live epochs, see `Draw`.

    Attributes:
        pinned: whether this process reads codes into page-locked memory; see `FeatureStore.read_rows`.
    """

    def __init__(
        self, inner: Any, switch: SourceSwitch, seed: int, texts: TextInputs | None = None, together: bool = False
    ):
        self.inner, self.seed, self.texts, self.pinned, self.together = inner, seed, texts, False, together
        self.switch: SourceSwitch | None = switch
        self._store: tuple[tuple[Path, StoreHandle | None], FeatureStore] | None = None
        self._selected: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, RequestedRow):
            return self.inner[index]
        fetched = self._fetch([index], lambda: [self.inner[index.index]])
        return fetched[0] if isinstance(fetched, list) else fetched

    def __getitems__(self, indices: Sequence[Any]) -> Any:
        rows = requested(indices)
        if rows is None:
            return fetch(self.inner, [index.index if isinstance(index, RequestedRow) else index for index in indices])
        return self._fetch(rows, lambda: fetch(self.inner, [row.index for row in rows]))

    def live_samples(self, numbers: Sequence[int], occurrences: Sequence[int], epoch: int) -> Any:
        """Samples as a live epoch would draw them, for the user's collator.

        What a `ReplayableTransform` draws is the same whenever it is drawn; other random numbers come from the global
        generators.

        Args:
            numbers: row numbers, B of them.
            occurrences: how often each was drawn in the epoch before.
            epoch: of the training.
        """
        origin = RowOrigin(epoch)
        return self.__getitems__(
            [RequestedRow(row, origin, times) for row, times in zip(numbers, occurrences, strict=True)]
        )

    def _fetch(self, rows: Sequence[RequestedRow], fetch_samples: Callable[[], Any]) -> Any:
        if self.switch is not None and self.switch.trial is not None:
            return self.switch.trial.rows
        origin = rows[0].origin
        if origin.store is not None:
            return self._read(origin, rows, fetch_samples)
        if origin.round is not None:
            return self._draw(origin.round, rows, fetch_samples)
        return self._draw_live(rows, fetch_samples)

    def _draw_live(self, rows: Sequence[RequestedRow], fetch_samples: Callable[[], Any]) -> Any:
        epoch = rows[0].origin.epoch
        numbers = [int(row) for row in rows]
        draw = Draw(self.seed, numbers, epoch=epoch, occurrences=_occurrences(rows), together=self.together)
        with use_draw(draw):
            return fetch_samples()

    def _draw(
        self, write_round: WriteRound, rows: Sequence[RequestedRow], fetch_samples: Callable[[], Any]
    ) -> DrawnRows:
        """Draws samples as the views of a round.

        Random numbers of other transforms than `ReplayableTransform` depend on the first sample of the batch.
        """
        numbers = [int(row) for row in rows]
        views = rotate_views(self.seed, write_round, numbers, _occurrences(rows))
        draw = Draw(self.seed, numbers, view=views.tolist(), geometry=write_round.geometry)
        again = [rows[0].occurrence] if rows[0].occurrence else []
        key: tuple[int | str, ...] = ("write", self.seed, numbers[0], write_round.number, *again)
        with seeded_rng(*key), use_draw(draw):
            samples = fetch_samples()
        geometry, is_augmented = None, torch.from_numpy(views > 0)
        if write_round.geometry is not None and len(draw.geometries) == int(is_augmented.sum()):
            dtype, length = geometry_column(*write_round.geometry)
            geometry = torch.zeros(len(rows), length, dtype=dtype)
            if draw.geometries:
                geometry[is_augmented] = torch.stack(draw.geometries)
        return DrawnRows(
            samples, BatchRows.of(rows), torch.from_numpy(views), geometry, draw.refused, (*key, "collate")
        )

    def __getattr__(self, name: str) -> Any:
        # Loaders call other methods of a data set as well, e.g. `set_epoch`.
        if name == "inner" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def _read(
        self, origin: RowOrigin, rows: Sequence[RequestedRow], fetch_samples: Callable[[], Any]
    ) -> CachedRows | LostRows:
        assert origin.store is not None  # the caller has asked
        numbers = [int(row) for row in rows]
        try:
            key = origin.store, origin.handle
            if self._store is None or self._store[0] != key:
                self._store = key, self._open(origin.store, origin.handle)
            store = self._store[1]
            views = choose_views(self.seed, origin.epoch, numbers, store.manifest.views, _occurrences(rows))
            entries = store.read_rows(numbers, views, self.pinned and get_worker_info() is None)
        except (StoreError, OSError) as error:  # the training goes on from samples
            return LostRows(BatchRows.of(rows), f"{error} ({type(error).__name__})")
        cached = CachedRows(entries, store.code_names(entries), BatchRows.of(rows))
        layout = store.codec.layout
        if not layout.is_token and not layout.is_trimmed:
            return cached
        return replace(cached, samples=self._draw_live(rows, fetch_samples), texts=self.texts)

    def _open(self, path: Path, handle: StoreHandle | None) -> FeatureStore:
        store = FeatureStore.open(path) if handle is None else handle.open()
        if handle is not None and handle.share is not None:
            return store if store.share is not None else store.spread(handle.share)
        if handle is None or not handle.is_selection or store.is_selection:
            return store
        rows = self._selected_rows()
        assert rows is not None  # where the handle comes from, the data set was a selection
        return store.select(rows)

    def _selected_rows(self) -> np.ndarray | None:
        if self._selected is not None:
            return self._selected
        selection = selection_of(self.inner)
        return None if selection is None else selection.rows

    def __getstate__(self) -> dict[str, Any]:
        # A loader process opens the store itself. A range of rows in memory is copied there without the rows beside
        # it, and does not tell any more which rows it is.
        return {**self.__dict__, "_store": None, "switch": None, "_selected": self._selected_rows()}


def _occurrences(rows: Sequence[RequestedRow]) -> list[int]:
    return [row.occurrence for row in rows]


def live_batch(source: RowSource, rows: BatchRows) -> Any:
    """A batch of the training once more, from samples, as a live epoch would draw and collate it.

    Args:
        source: the samples of the training.
        rows: which rows, e.g. those of a batch from a store.
    """
    dataset = ReplayDataset(source.dataset, SourceSwitch(0), source.seed, together=bool(source.combined))
    epoch = int(rows.epochs[-1])
    return source.collator(dataset.live_samples(rows.numbers.tolist(), rows.occurrences.tolist(), epoch))
