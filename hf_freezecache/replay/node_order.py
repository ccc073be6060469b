"""The order in which nodes with disks of their own read their shares: the sampler's, restricted to each share.

A loader's sampler yields the same rows on all processes, and accelerate gives every process some places of that
sequence. A node's share has as many rows as its processes have places. In a replay epoch they read its rows there, in
the order in which the sampler has drawn them, so that length, batches, seeds and resume stay those of `Trainer`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate.data_loader import (
    BatchSamplerShard,
    DataLoaderDispatcher,
    DataLoaderShard,
    SeedableRandomSampler,
    SkipBatchSampler,
)
from torch.utils.data import BatchSampler, RandomSampler

from ..nodes import Nodes


class OrderError(ValueError):
    """Nodes cannot read their shares in the order of a loader; the message says why and what to do."""


class Filler(int):
    """A row of the own node at a place of another one: read only where a last batch is filled up."""


@dataclass(frozen=True)
class Dealing:
    """Which node reads each place of a sampler's sequence.

    Args:
        nodes: of the training.
        batch_size: of the loader's batches; of all processes together where batches are split.
        split: whether each process gets a part of every batch, in place of every so many-th batch.
    """

    nodes: Nodes
    batch_size: int
    split: bool = False

    @classmethod
    def of(cls, loader: Any, nodes: Nodes, rows: int) -> Dealing:
        """That of a training's loader.

        Args:
            loader: as accelerate has prepared it, its sampler not stamped yet.
            nodes: of the training.
            rows: of the data set.

        Raises:
            OrderError: if its order cannot be kept, or a node gets no rows.
        """
        if isinstance(loader, DataLoaderDispatcher):
            raise OrderError(
                "dispatch_batches=True sends the rows that the main process has read, and cache_scope='node' reads "
                "each where it is stored: set dispatch_batches=False in accelerator_config."
            )
        if not isinstance(loader, DataLoaderShard):
            raise OrderError(_describe(loader))
        if loader.use_stateful_dataloader:
            raise OrderError("cache_scope='node' does not keep the state of use_stateful_dataloader: turn it off.")
        batches = loader.batch_sampler
        while isinstance(batches, SkipBatchSampler):
            batches = batches.batch_sampler
        shard = batches if isinstance(batches, BatchSamplerShard) else None
        inner = batches if shard is None else shard.batch_sampler
        sampler: Any = getattr(inner, "sampler", None)
        if type(inner) is not BatchSampler or shard is None or shard.num_processes != len(nodes.of):
            raise OrderError(_describe(inner if shard is not None else batches))
        is_random = sampler.__class__ in (RandomSampler, SeedableRandomSampler)  # it may be stamped
        if not is_random or sampler.replacement or sampler.num_samples != rows:
            raise OrderError(_describe(sampler))
        dealing = cls(nodes, inner.batch_size, shard.split_batches)
        if 0 in dealing.counts(rows):
            raise OrderError(
                f"{rows} rows in batches of {inner.batch_size} leave a node without rows, and cache_scope='node' "
                "needs some on each: train with fewer processes, or smaller batches."
            )
        return dealing

    def owners(self, rows: int) -> np.ndarray:
        """The node that reads each place, int64 `(rows,)`.

        Args:
            rows: of the data set, and so places of the sequence.
        """
        places, processes = np.arange(rows), len(self.nodes.of)
        if self.split:
            ranks = places % self.batch_size // (self.batch_size // processes)
        else:
            ranks = places // self.batch_size % processes
        return np.array(self.nodes.of, np.int64)[ranks]

    def counts(self, rows: int) -> tuple[int, ...]:
        """How many places each node reads."""
        return tuple(np.bincount(self.owners(rows), minlength=self.nodes.count).tolist())

    def order(self, drawn: Sequence[Any], places: np.ndarray) -> Iterator[Any]:
        """The rows in the order in which this node reads them.

        Args:
            drawn: rows as the sampler has drawn them.
            places: for every row its place in the share of this node, or -1.

        Raises:
            OrderError: if the sampler has not drawn every row once.
        """
        numbers = np.fromiter((int(row) for row in drawn), np.int64, len(drawn))
        if len(numbers) != len(places) or not np.array_equal(np.sort(numbers), np.arange(len(places))):
            raise OrderError("the sampler has not drawn every row of the train data set once in this epoch.")
        own = np.flatnonzero(places[numbers] >= 0)
        is_own = self.owners(len(numbers)) == self.nodes.own
        # Each of the two kinds of places begins with the first row.
        turn = np.where(is_own, np.cumsum(is_own), np.cumsum(~is_own)) - 1
        for mine, number in zip(is_own.tolist(), turn.tolist(), strict=True):
            row = drawn[own[number % len(own)]]
            yield row if mine else Filler(int(row))


def _describe(sampler: Any) -> str:
    return (
        f"cache_scope='node' draws rows at random, every row once in an epoch, and each node its own; the loader's "
        f"{sampler.__class__.__name__} draws them otherwise (train_sampling_strategy other than 'random', a "
        "sampler of your own, or rows drawn with replacement). Use a folder that all machines see, or the random "
        "sampler."
    )
