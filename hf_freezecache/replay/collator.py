"""Batches of cached rows, and of live ones through the user's own collator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..rng import seeded_rng
from .dataset import CachedRows, DrawnRows

#: Prefix of a batch entry that holds codes: no model input and no user column is named so.
CODE_PREFIX = "freezecache."
#: Prefix of a batch entry that says which views live samples were drawn as; no codes are in such a batch.
DRAWN_PREFIX = "freezecache-drawn."


class ReplayCollator:
    """Collates a batch of a `ReplayDataset`.

    Live samples go through the user's collator untouched. Cached rows become a dict of the codec's integers, named
    `freezecache.<column>`, and the model inputs as the user's collator returned them at the build. Decoding happens on
    the device, after the transfer. Live samples that are drawn for a store get entries beside what the user's collator
    returns: which sample and view each is, and its geometry.

    Args:
        collator: the user's collator.
    """

    def __init__(self, collator: Callable):
        self.collator = collator

    def __call__(self, features: Any) -> Any:
        if isinstance(features, CachedRows):
            return _name_codes(features)
        if isinstance(features, list) and features and isinstance(features[0], CachedRows):
            return _name_codes(_merge(features))
        if isinstance(features, DrawnRows):
            return self._collate_drawn(features)
        if isinstance(features, list) and features and isinstance(features[0], DrawnRows):
            return self._collate_drawn(_merge_drawn(features))
        return self.collator(features)

    def _collate_drawn(self, drawn: DrawnRows) -> dict[str, Any]:
        with seeded_rng(*drawn.key):
            batch = dict(self.collator(drawn.samples))
        batch |= {DRAWN_PREFIX + "numbers": drawn.numbers, DRAWN_PREFIX + "views": drawn.views}
        if drawn.geometry is not None:
            batch[DRAWN_PREFIX + "geometry"] = drawn.geometry
        if drawn.refused is not None:
            batch[DRAWN_PREFIX + "refused"] = drawn.refused
        return batch


@dataclass(frozen=True)
class DrawnViews:
    """Which views the live samples of a batch were drawn as; see `DrawnRows`."""

    numbers: torch.Tensor
    views: torch.Tensor
    geometry: torch.Tensor | None = None
    refused: str | None = None


def take_drawn(batch: Mapping[str, Any]) -> tuple[DrawnViews, dict[str, Any]] | None:
    """Splits a live batch into what it was drawn for and the model inputs; None if it was drawn for no store."""
    if not isinstance(batch, Mapping) or DRAWN_PREFIX + "numbers" not in batch:
        return None
    drawn = {name.removeprefix(DRAWN_PREFIX): value for name, value in batch.items() if name.startswith(DRAWN_PREFIX)}
    return DrawnViews(**drawn), {name: value for name, value in batch.items() if not name.startswith(DRAWN_PREFIX)}


def take_codes(batch: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Splits a replayed batch into codes by column and the model inputs; None if the batch is live."""
    if not isinstance(batch, Mapping) or not any(is_code(name) for name in batch):
        return None
    codes = {name.removeprefix(CODE_PREFIX): value for name, value in batch.items() if is_code(name)}
    return codes, {name: value for name, value in batch.items() if not is_code(name)}


def is_code(name: Any) -> bool:
    """Whether a batch entry holds codes."""
    return isinstance(name, str) and name.startswith(CODE_PREFIX)


def _name_codes(cached: CachedRows) -> dict[str, Any]:
    return {(CODE_PREFIX + name if name in cached.codes else name): value for name, value in cached.rows.items()}


def _merge(rows: list[CachedRows]) -> CachedRows:
    merged = {}
    for name, value in rows[0].rows.items():
        if isinstance(value, torch.Tensor):
            merged[name] = torch.cat([row.rows[name] for row in rows])
        elif isinstance(value, list):
            merged[name] = [item for row in rows for item in row.rows[name]]
        else:
            merged[name] = value
    return CachedRows(merged, rows[0].codes)


def _merge_drawn(rows: list[DrawnRows]) -> DrawnRows:
    """Rows that were fetched one by one, each a list of one sample."""
    geometry = [row.geometry for row in rows]
    return DrawnRows(
        [row.samples[0] for row in rows],
        torch.cat([row.numbers for row in rows]),
        torch.cat([row.views for row in rows]),
        None if any(part is None for part in geometry) else torch.cat(geometry),
        next((row.refused for row in rows if row.refused is not None), None),
        rows[0].key,
    )
