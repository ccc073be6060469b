"""The train data set whose source turns from images to cached rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..augment.draws import Draw, use_draw
from ..augment.geometry import GEOMETRY_KINDS, geometry_column
from ..cache.rows import fetch
from ..cache.store import FeatureStore
from ..rng import hash_key, seeded_rng

_MAX_PATH = 4096


@dataclass(frozen=True)
class WriteRound:
    """An epoch whose features are stored while it runs live: every sample is drawn as one of its views.

    Args:
        number: how many such epochs came before, from 0.
        views: augmented views beside the base view; after `views + 1` rounds each sample has had each view once.
        geometry: kind and feature grid in which the views' geometry is wanted; None if it is not.
    """

    number: int
    views: int
    geometry: tuple[str, tuple[int, int]] | None = None


class SourceSwitch:
    """Which source an epoch's batches come from, in shared memory: loader processes that live on see it too."""

    def __init__(self):
        self._length = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._path = torch.zeros(_MAX_PATH, dtype=torch.uint8).share_memory_()
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        # Of a `WriteRound`: 1, number, views, kind of geometry from 1 or 0, height and width of the grid.
        self._round = torch.zeros(6, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The running epoch."""
        return int(self._epoch[0])

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch[0] = epoch

    @property
    def path(self) -> Path | None:
        """The store that is replayed; None for live epochs, those that are stored included."""
        length = int(self._length[0])
        return Path(bytes(self._path[:length].tolist()).decode()) if length else None

    def set(self, path: Path | None) -> None:
        """Turns to a store, or back to live (None). Takes effect with the next epoch's first batch."""
        encoded = b"" if path is None else str(path.absolute()).encode()
        if len(encoded) > _MAX_PATH:
            raise ValueError(f"the path of the feature store is longer than {_MAX_PATH} bytes: {path}.")
        self._path[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
        self._length[0] = len(encoded)
        self._round.zero_()

    @property
    def round(self) -> WriteRound | None:
        """What the live samples are drawn for; None if they are not stored."""
        running, number, views, kind, height, width = self._round.tolist()
        if not running:
            return None
        return WriteRound(number, views, (GEOMETRY_KINDS[kind - 1], (height, width)) if kind else None)

    def write(self, round: WriteRound) -> None:
        """Turns to live samples drawn as views. Takes effect with the next epoch's first batch."""
        self.set(None)
        kind, grid = (0, (0, 0)) if round.geometry is None else round.geometry
        kind = kind and GEOMETRY_KINDS.index(kind) + 1
        self._round.copy_(torch.tensor([1, round.number, round.views, kind, *grid]))


@dataclass(frozen=True)
class CachedRows:
    """Rows read from a store, before collating: codes and model inputs by name.

    Args:
        rows: what `FeatureStore.read_rows` returned.
        codes: which of them are codes.
    """

    rows: dict[str, Any]
    codes: tuple[str, ...]


@dataclass(frozen=True)
class DrawnRows:
    """Live samples of a `WriteRound`, before collating.

    Args:
        samples: as the user's collator takes them.
        numbers: row numbers, int64 `(B,)`.
        views: view of each, int64 `(B,)`.
        geometry: `(B, G)`, zeros for base views; None if it was not asked for or could not be told.
        refused: why a replayable transform could not tell it.
        key: what the random numbers of the user's collator depend on.
    """

    samples: Any
    numbers: torch.Tensor
    views: torch.Tensor
    geometry: torch.Tensor | None
    refused: str | None
    key: tuple[int | str, ...]


def rotate_views(seed: int, round: WriteRound, samples: Sequence[int]) -> np.ndarray:
    """Which view each sample is drawn as: base and augmented views side by side in every round, as in replay.

    Args:
        seed: of the training.
        round: of the epoch; over `views + 1` rounds a sample gets each of its views once.
        samples: row numbers.

    Returns:
        int64 `(B,)`, from 0 to `round.views`.
    """
    drawn = [(hash_key("write", seed, sample) + round.number) % (round.views + 1) for sample in samples]
    return np.array(drawn, dtype=np.int64)


def choose_views(seed: int, epoch: int, samples: Sequence[int], views: int) -> np.ndarray:
    """Which view each sample gets in a replay epoch: every one alike, the base view included.

    Args:
        seed: of the training; nothing else but it, the epoch and the sample counts.
        epoch: of the training.
        samples: row numbers.
        views: augmented views in the store.

    Returns:
        int64 `(B,)`, from 0 to `views`.
    """
    drawn = [hash_key("replay", seed, epoch, sample) % (views + 1) for sample in samples]
    return np.array(drawn, dtype=np.int64)


class ReplayDataset(Dataset):
    """Wraps the user's map-style data set once for a training; its length and sample order never change.

    Args:
        inner: the user's data set.
        switch: says where samples come from.
        seed: what a replayable transform draws, and which view is replayed, depends on it, the epoch and the sample.
    """

    def __init__(self, inner: Any, switch: SourceSwitch, seed: int):
        self.inner, self.switch, self.seed = inner, switch, seed
        self._store: FeatureStore | None = None

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        path = self.switch.path
        if path is not None:
            return self._read(path, [index])
        round = self.switch.round
        if round is not None:
            return self._draw(round, [index], lambda: [self.inner[index]])
        with self._drawing([index]):
            return self.inner[index]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        path = self.switch.path
        if path is not None:
            return self._read(path, indices)
        round = self.switch.round
        if round is not None:
            return self._draw(round, indices, lambda: fetch(self.inner, indices))
        with self._drawing(indices):
            return fetch(self.inner, indices)

    def _drawing(self, indices: Sequence[int]) -> AbstractContextManager:
        return use_draw(Draw(self.seed, indices, epoch=self.switch.epoch))

    def _draw(self, round: WriteRound, indices: Sequence[int], fetch_samples: Callable[[], Any]) -> DrawnRows:
        """Samples as the views that this round is for; what no `ReplayableTransform` draws depends on the batch."""
        views = rotate_views(self.seed, round, indices)
        wanted = Draw(self.seed, indices, view=views.tolist(), geometry=round.geometry)
        key = ("write", self.seed, indices[0], round.number)
        with seeded_rng(*key), use_draw(wanted):
            samples = fetch_samples()
        geometry, augmented = None, torch.from_numpy(views > 0)
        if round.geometry is not None and len(wanted.geometries) == int(augmented.sum()):
            dtype, length = geometry_column(*round.geometry)
            geometry = torch.zeros(len(indices), length, dtype=dtype)
            if wanted.geometries:
                geometry[augmented] = torch.stack(wanted.geometries)
        return DrawnRows(
            samples, torch.tensor(indices), torch.from_numpy(views), geometry, wanted.refused, (*key, "collate")
        )

    def __getattr__(self, name: str) -> Any:
        # Loaders call what a data set offers besides its rows, e.g. `set_epoch`.
        if name == "inner" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def _read(self, path: Path, indices: Sequence[int]) -> CachedRows:
        if self._store is None or self._store.path != path:
            self._store = FeatureStore.open(path)
        views = choose_views(self.seed, self.switch.epoch, indices, self._store.manifest.views)
        rows = self._store.read_rows(indices, views)
        return CachedRows(rows, self._store.code_names(rows))

    def __getstate__(self) -> dict[str, Any]:
        # A mapped file does not travel to a loader process; it is opened again there.
        return {**self.__dict__, "_store": None}


class EvaluationDataset(ReplayDataset):
    """Wraps an evaluation set, whose source turns to a store for the length of an evaluation.

    Images are fetched as without it: a random transform, a replayable one too, draws from the global generators.
    """

    def _drawing(self, indices: Sequence[int]) -> AbstractContextManager:
        return nullcontext()
