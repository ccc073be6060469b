"""Batches of cached rows, and of live ones through the user's own collator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .dataset import CachedRows

#: Prefix of a batch entry that holds codes: no model input and no user column is named so.
CODE_PREFIX = "freezecache."


class ReplayCollator:
    """Collates a batch of a `ReplayDataset`.

    Live samples go through the user's collator untouched. Cached rows become a dict of the codec's integers, named
    `freezecache.<column>`, and the model inputs as the user's collator returned them at the build. Decoding happens on
    the device, after the transfer.

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
        return self.collator(features)


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
