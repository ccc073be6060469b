"""The wrapped data set, whose rows come from images or from a store."""

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


class SourceSwitch:
    """The source of an epoch's batches, in shared memory so that persistent loader processes see a change."""

    def __init__(self):
        self._length = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._path = torch.zeros(_MAX_PATH, dtype=torch.uint8).share_memory_()
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        # A `WriteRound` as 1, number, views, kind of geometry (from 1; 0: none), height and width of the grid.
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
        """Path of the store that is replayed; None in live epochs, also in those that are stored."""
        length = int(self._length[0])
        return Path(bytes(self._path[:length].tolist()).decode()) if length else None

    def set(self, path: Path | None) -> None:
        """Sets the source: a store, or images. Takes effect with the first batch of the next epoch.

        Args:
            path: of the store; None: images.

        Raises:
            ValueError: if the path is too long.
        """
        encoded = b"" if path is None else str(path.absolute()).encode()
        if len(encoded) > _MAX_PATH:
            raise ValueError(f"the path of the feature store is longer than {_MAX_PATH} bytes: {path}.")
        self._path[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
        self._length[0] = len(encoded)
        self._round.zero_()

    @property
    def round(self) -> WriteRound | None:
        """The round of a live epoch that is stored; None in all other epochs."""
        running, number, views, kind, height, width = self._round.tolist()
        if not running:
            return None
        return WriteRound(number, views, (GEOMETRY_KINDS[kind - 1], (height, width)) if kind else None)

    def write(self, write_round: WriteRound) -> None:
        """Sets the source: images drawn as views of a round. Takes effect with the first batch of the next epoch."""
        self.set(None)
        kind, grid = (0, (0, 0)) if write_round.geometry is None else write_round.geometry
        kind = kind and GEOMETRY_KINDS.index(kind) + 1
        self._round.copy_(torch.tensor([1, write_round.number, write_round.views, kind, *grid]))


@dataclass(frozen=True)
class CachedRows:
    """Rows of a store, before collating.

    Args:
        rows: codes and model inputs by name, as `FeatureStore.read_rows` returned them.
        codes: names of the codes among them.
    """

    rows: dict[str, Any]
    codes: tuple[str, ...]


@dataclass(frozen=True)
class DrawnRows:
    """Live samples of a `WriteRound`, before collating.

    Args:
        samples: the samples for the user's collator.
        numbers: row numbers, int64 `(B,)`.
        views: view of each sample, int64 `(B,)`.
        geometry: the views' geometry `(B, G)`, zeros for base views; None if it was not requested or no transform
            returned it.
        refused: why a replayable transform could not return it; None if it could.
        key: seed of the random numbers of the user's collator, see `seeded_rng`.

    Shapes: B samples, G numbers of a view's geometry.
    """

    samples: Any
    numbers: torch.Tensor
    views: torch.Tensor
    geometry: torch.Tensor | None
    refused: str | None
    key: tuple[int | str, ...]


def rotate_views(seed: int, write_round: WriteRound, samples: Sequence[int]) -> np.ndarray:
    """The view as which each sample is drawn in a round. As in replay, every round has base and augmented views.

    Args:
        seed: of the training.
        write_round: the round. In `views + 1` rounds every sample gets each of its views once.
        samples: row numbers, B of them.

    Returns:
        int64 `(B,)`, from 0 to `write_round.views`.
    """
    views = [(hash_key("write", seed, sample) + write_round.number) % (write_round.views + 1) for sample in samples]
    return np.array(views, dtype=np.int64)


def choose_views(seed: int, epoch: int, samples: Sequence[int], views: int) -> np.ndarray:
    """The view that each sample gets in a replay epoch; all views, the base view included, are equally likely.

    It depends on the seed, the epoch and the sample, and on nothing else.

    Args:
        seed: of the training.
        epoch: of the training, from 0.
        samples: row numbers, B of them.
        views: number of augmented views in the store.

    Returns:
        int64 `(B,)`, from 0 to `views`.
    """
    choices = [hash_key("replay", seed, epoch, sample) % (views + 1) for sample in samples]
    return np.array(choices, dtype=np.int64)


class ReplayDataset(Dataset):
    """Wraps the user's map-style data set for a training. Its length and the order of its samples never change.

    Args:
        inner: the user's data set.
        switch: the source of an epoch's rows.
        seed: of the training. What a replayable transform draws, and which view is replayed, depend on it, the epoch
            and the sample.
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
        write_round = self.switch.round
        if write_round is not None:
            return self._draw(write_round, [index], lambda: [self.inner[index]])
        with self._drawing([index]):
            return self.inner[index]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        path = self.switch.path
        if path is not None:
            return self._read(path, indices)
        write_round = self.switch.round
        if write_round is not None:
            return self._draw(write_round, indices, lambda: fetch(self.inner, indices))
        with self._drawing(indices):
            return fetch(self.inner, indices)

    def _drawing(self, indices: Sequence[int]) -> AbstractContextManager:
        return use_draw(Draw(self.seed, indices, epoch=self.switch.epoch))

    def _draw(self, write_round: WriteRound, indices: Sequence[int], fetch_samples: Callable[[], Any]) -> DrawnRows:
        """Draws samples as the views of a round.

        Random numbers of other transforms than `ReplayableTransform` depend on the first sample of the batch.
        """
        views = rotate_views(self.seed, write_round, indices)
        draw = Draw(self.seed, indices, view=views.tolist(), geometry=write_round.geometry)
        key = ("write", self.seed, indices[0], write_round.number)
        with seeded_rng(*key), use_draw(draw):
            samples = fetch_samples()
        geometry, is_augmented = None, torch.from_numpy(views > 0)
        if write_round.geometry is not None and len(draw.geometries) == int(is_augmented.sum()):
            dtype, length = geometry_column(*write_round.geometry)
            geometry = torch.zeros(len(indices), length, dtype=dtype)
            if draw.geometries:
                geometry[is_augmented] = torch.stack(draw.geometries)
        return DrawnRows(
            samples, torch.tensor(indices), torch.from_numpy(views), geometry, draw.refused, (*key, "collate")
        )

    def __getattr__(self, name: str) -> Any:
        # Loaders call other methods of a data set as well, e.g. `set_epoch`.
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
        # Mapped memory cannot be pickled: a loader process opens the store itself.
        return {**self.__dict__, "_store": None}


class EvaluationDataset(ReplayDataset):
    """Wraps an evaluation set, whose rows come from a store during a cached evaluation.

    Images are fetched as from the data set itself: a random transform, also a replayable one, draws from the global
    generators.
    """

    def _drawing(self, indices: Sequence[int]) -> AbstractContextManager:
        return nullcontext()
