"""The share of a data set's rows that one node stores, where each node has a disk of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..rng import hash_key
from .rows import RowSource

#: Entry of a fingerprint's inputs: whose share of how many rows a store holds.
SHARE = "share"


@dataclass(frozen=True)
class Share:
    """The rows of one node. They follow from these numbers alone, in every process and every run.

    Args:
        counts: rows of every node.
        node: whose share it is.
        seed: of the training.
        cut: frozen blocks of the store: the rows of each are dealt anew.
    """

    counts: tuple[int, ...]
    node: int
    seed: int
    cut: int

    @property
    def total(self) -> int:
        """Rows of the data set."""
        return sum(self.counts)

    def rows(self) -> np.ndarray:
        """Row numbers of the share, ascending, int64 `(N,)`.

        Shapes: N rows of the share.
        """
        generator = np.random.default_rng(hash_key("share", self.seed, self.cut) & 0xFFFFFFFF)
        first = sum(self.counts[: self.node])
        return np.sort(generator.permutation(self.total)[first : first + self.counts[self.node]]).astype(np.int64)

    def places(self) -> np.ndarray:
        """For every row of the data set its place in the share, or -1, int64 `(total,)`."""
        places = np.full(self.total, -1, np.int64)
        places[self.rows()] = np.arange(self.counts[self.node])
        return places

    def to_json(self) -> dict[str, Any]:
        """What a fingerprint says of it."""
        return {"node": self.node, "of": self.total, "counts": list(self.counts)}


def share_rows(source: RowSource, share: Share) -> RowSource:
    """The rows of a share as samples of their own, numbered by their places.

    What is drawn for a row follows from its number in the whole data set.

    Args:
        source: the whole data set.
        share: which of its rows.
    """
    return source.chosen(share.rows().tolist())
