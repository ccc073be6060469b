"""The train data set whose source turns from images to cached rows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..cache.rows import fetch
from ..cache.store import FeatureStore
from ..drawing import Drawing, drawing
from ..rng import hash_key

_MAX_PATH = 4096


class SourceSwitch:
    """Which source an epoch's batches come from, in shared memory: loader processes that live on see it too."""

    def __init__(self):
        self._length = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._path = torch.zeros(_MAX_PATH, dtype=torch.uint8).share_memory_()
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The running epoch."""
        return int(self._epoch[0])

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch[0] = epoch

    @property
    def path(self) -> Path | None:
        """The store that is replayed; None for live epochs."""
        length = int(self._length[0])
        return Path(bytes(self._path[:length].tolist()).decode()) if length else None

    def set(self, path: Path | None) -> None:
        """Turns to a store, or back to live (None). Takes effect with the next epoch's first batch."""
        encoded = b"" if path is None else str(path.absolute()).encode()
        if len(encoded) > _MAX_PATH:
            raise ValueError(f"the path of the feature store is longer than {_MAX_PATH} bytes: {path}.")
        self._path[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
        self._length[0] = len(encoded)


@dataclass(frozen=True)
class CachedRows:
    """Rows read from a store, before collating: codes and model inputs by name.

    Args:
        rows: what `FeatureStore.read_rows` returned.
        codes: which of them are codes.
    """

    rows: dict[str, Any]
    codes: tuple[str, ...]


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
        with self._drawing([index]):
            return self.inner[index]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        path = self.switch.path
        if path is not None:
            return self._read(path, indices)
        with self._drawing(indices):
            return fetch(self.inner, indices)

    def _drawing(self, indices: Sequence[int]) -> AbstractContextManager:
        return drawing(Drawing(self.seed, indices, epoch=self.switch.epoch))

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
