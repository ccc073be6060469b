"""Some rows of a data set, in another order, as the training reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from ..cache.rows import RowSource, fetch
from ..distributed import Group


def in_random_order(source: RowSource, group: Group) -> list[int]:
    """This process's share of all rows, in an order that depends on the seed of the training alone.

    Args:
        source: of all rows.
        group: the processes; all get as many rows.
    """
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(source.seed)).tolist()
    return order[group.rank :: group.size][: len(order) // group.size]


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


class _Reordered(Dataset):
    def __init__(self, dataset: Any, rows: Sequence[int]):
        self.dataset, self.rows = dataset, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        return self.dataset[self.rows[row]]

    def __getitems__(self, rows: Sequence[int]) -> Any:
        return fetch(self.dataset, [self.rows[row] for row in rows])
