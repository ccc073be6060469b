"""Collating cached rows, and live samples with the user's collator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..rng import seeded_rng
from .dataset import CachedRows, DrawnRows

#: Prefix of a batch entry that holds codes; no model input has such a name.
CODE_PREFIX = "freezecache."
#: Prefix of a batch entry that describes live samples which are stored while they train the model.
DRAWN_PREFIX = "freezecache-drawn."


class ReplayCollator:
    """Collates a batch of a `ReplayDataset`.

    Live samples go to the user's collator unchanged. Cached rows become a dict of codes, named `freezecache.<column>`,
    and of the model inputs as the user's collator returned them when the store was built; the codes are decoded on the
    model's device after the transfer. Live samples that are stored while they train the model go to the user's
    collator, and the batch gets further entries: row number, view and geometry of each sample.

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
            return self._collate_views(features)
        if isinstance(features, list) and features and isinstance(features[0], DrawnRows):
            return self._collate_views(_merge_views(features))
        return self.collator(features)

    def _collate_views(self, rows: DrawnRows) -> dict[str, Any]:
        with seeded_rng(*rows.key):
            batch = dict(self.collator(rows.samples))
        batch |= {DRAWN_PREFIX + "numbers": rows.numbers, DRAWN_PREFIX + "views": rows.views}
        if rows.geometry is not None:
            batch[DRAWN_PREFIX + "geometry"] = rows.geometry
        if rows.refused is not None:
            batch[DRAWN_PREFIX + "refused"] = rows.refused
        return batch


@dataclass(frozen=True)
class DrawnViews:
    """Samples and views of a live batch that is stored while it trains the model.

    Args:
        numbers: row numbers, int64 `(B,)`.
        views: view of each sample, int64 `(B,)`.
        geometry: the views' geometry `(B, G)`, zeros for base views; None if it was not requested or no transform
            returned it.
        refused: why a replayable transform could not return it; None if it could.

    Shapes: B samples, G numbers of a view's geometry.
    """

    numbers: torch.Tensor
    views: torch.Tensor
    geometry: torch.Tensor | None = None
    refused: str | None = None


def take_drawn(batch: Mapping[str, Any]) -> tuple[DrawnViews, dict[str, Any]] | None:
    """Splits a live batch that is stored into its views and its model inputs.

    Args:
        batch: a collated batch.

    Returns:
        The views, and the model inputs by name; None for any other batch.
    """
    if not isinstance(batch, Mapping) or DRAWN_PREFIX + "numbers" not in batch:
        return None
    entries = {
        name.removeprefix(DRAWN_PREFIX): value for name, value in batch.items() if name.startswith(DRAWN_PREFIX)
    }
    return DrawnViews(**entries), {name: value for name, value in batch.items() if not name.startswith(DRAWN_PREFIX)}


def take_codes(batch: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Splits a replayed batch into its codes and its model inputs.

    Args:
        batch: a collated batch.

    Returns:
        Codes by column, and model inputs by name; None for a live batch.
    """
    if not isinstance(batch, Mapping) or not any(is_code(name) for name in batch):
        return None
    codes = {name.removeprefix(CODE_PREFIX): value for name, value in batch.items() if is_code(name)}
    return codes, {name: value for name, value in batch.items() if not is_code(name)}


def is_code(name: Any) -> bool:
    """Whether a batch entry holds codes."""
    return isinstance(name, str) and name.startswith(CODE_PREFIX)


def _name_codes(rows: CachedRows) -> dict[str, Any]:
    return {(CODE_PREFIX + name if name in rows.codes else name): value for name, value in rows.rows.items()}


def _merge(rows: list[CachedRows]) -> CachedRows:
    """Joins rows that were read one by one."""
    merged: dict[str, Any] = {}
    for name, value in rows[0].rows.items():
        if isinstance(value, torch.Tensor):
            merged[name] = torch.cat([row.rows[name] for row in rows])
        elif isinstance(value, list):
            merged[name] = [item for row in rows for item in row.rows[name]]
        else:
            merged[name] = value
    return CachedRows(merged, rows[0].codes)


def _merge_views(rows: list[DrawnRows]) -> DrawnRows:
    """Joins rows that were fetched one by one, each with one sample."""
    geometry = [row.geometry for row in rows if row.geometry is not None]
    return DrawnRows(
        [row.samples[0] for row in rows],
        torch.cat([row.numbers for row in rows]),
        torch.cat([row.views for row in rows]),
        torch.cat(geometry) if len(geometry) == len(rows) else None,
        next((row.refused for row in rows if row.refused is not None), None),
        rows[0].key,
    )
