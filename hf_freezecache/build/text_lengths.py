"""Texts of a data set by their length."""

from __future__ import annotations

from ..cache.rows import RowSource
from ..model.tokens import token_mask
from ..rng import preserve_rng
from .materialize import spread

#: Texts of which the lengths are looked at.
_TEXTS = 64


def rows_by_length(source: RowSource, main_input: str) -> list[int] | None:
    """Rows from all over a data set of texts, the shortest first; None if its samples are no texts with a mask.

    Args:
        source: the samples.
        main_input: name of the tokens in a batch.

    Raises:
        Exception: whatever the collator raises.
    """
    rows = spread(len(source), min(_TEXTS, len(source)))
    lengths: dict[int, int] = {}
    with preserve_rng():
        for first in range(0, len(rows), source.batch_size):
            chosen = rows[first : first + source.batch_size]
            mask = token_mask(source.collate(chosen), main_input)
            if mask is None:
                return None
            lengths |= dict(zip(chosen, mask.flatten(1).sum(1).tolist(), strict=True))
    return sorted(rows, key=lengths.__getitem__)
