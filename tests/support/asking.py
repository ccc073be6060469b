"""Rows and batches as a training asks for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader

from hf_freezecache.replay.dataset import ReplayDataset
from hf_freezecache.replay.requests import SourceSwitch, stamp_rows


def wrap(inner: Any, seed: int = 0) -> ReplayDataset:
    """A data set of a training, whose source is images."""
    return ReplayDataset(inner, SourceSwitch(len(inner)), seed)


def ask(dataset: ReplayDataset, rows: Sequence[int]) -> Any:
    """Rows that the training asks for, fetched together."""
    return dataset.__getitems__([dataset.switch.stamp(row) for row in rows])


def ask_singly(dataset: ReplayDataset, rows: Sequence[int]) -> list[Any]:
    """Rows that the training asks for, fetched one by one."""
    return [dataset[dataset.switch.stamp(row)] for row in rows]


class TrainingLoader:
    """A loader over which the training iterates."""

    def __init__(self, dataset: ReplayDataset, **settings):
        self.loader, self.switch = DataLoader(dataset, **settings), dataset.switch
        stamp_rows(self.loader, self.switch)

    def __iter__(self) -> Iterator[Any]:
        with self.switch.requesting():
            yield from self.loader
