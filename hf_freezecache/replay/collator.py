"""Collating cached rows, and live samples with the user's collator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from ..cache.names import SIZES, TOKENS, WIDEST
from ..cache.padded import PaddingRule, why_other_samples
from ..cache.sized import SizeRule, why_other_sizes
from ..cache.texts import place_tokens, why_other_texts
from ..model.stand_ins import stays_real
from ..model.tokens import MASK, token_mask
from ..rng import seeded_rng
from .dataset import BatchRows, CachedRows, DrawnRows, LostRows

#: Prefix of a batch entry that holds codes; no model input has such a name.
CODE_PREFIX = "freezecache."
#: Among the codes of features of batches of any size: an empty tensor of the shape of the batch's main input, and 0.
SIZE = "size"
#: Prefix of a batch entry that describes live samples which are stored while they train the model.
DRAWN_PREFIX = "freezecache-drawn."
#: Entry of a batch whose rows could not be read from the store, or are others by now: why.
LOST = "freezecache-lost"
#: Prefix of a batch entry that says which rows the batch holds.
ROW_PREFIX = "freezecache-row."


class ReplayCollator:
    """Collates a batch of a `ReplayDataset`.

    Live samples go to the user's collator unchanged. Cached rows become a dict of codes, named `freezecache.<column>`,
    and of the model inputs as the user's collator returned them when the store was built; the codes are decoded on the
    model's device after the transfer. Of texts, the samples themselves go to the user's collator, and codes are padded
    as it pads. Live samples that are stored while they train the model go to the user's
    collator, and the batch gets further entries: view and geometry of each sample. Both kinds of batches say which
    rows they hold.

    Args:
        collator: the user's collator.
    """

    def __init__(self, collator: Callable):
        self.collator = collator

    def __call__(self, features: Any) -> Any:
        rows = features if isinstance(features, list) else [features]
        lost = next((row for row in rows if isinstance(row, LostRows)), None)
        if lost is not None:
            return {LOST: lost.why, **_name_rows(BatchRows.merge([row.requested for row in rows]))}
        if isinstance(features, CachedRows):
            return self._collate_cached(features)
        if isinstance(features, list) and features and isinstance(features[0], CachedRows):
            return self._collate_cached(_merge(features))
        if isinstance(features, DrawnRows):
            return self._collate_views(features)
        if isinstance(features, list) and features and isinstance(features[0], DrawnRows):
            return self._collate_views(_merge_views(features))
        return self.collator(features)

    def _collate_cached(self, rows: CachedRows) -> dict[str, Any]:
        if rows.samples is None:
            return _name_codes(rows)
        batch = self.collator(rows.samples)
        if SIZES in rows.rows:
            return _collate_sized(rows, batch)
        if WIDEST in rows.rows:
            return _collate_trimmed(rows, batch)
        assert rows.texts is not None  # beside samples
        why = why_other_texts(rows.rows, batch, rows.texts)
        if why is not None:
            return {LOST: why, **_name_rows(rows.requested)}
        mask = token_mask(batch, rows.texts.main_input)
        assert mask is not None  # the batch is one of texts
        codes = {name: place_tokens(rows.rows[name], mask) for name in rows.codes} | {MASK: mask}
        return {**batch, **{CODE_PREFIX + name: value for name, value in codes.items()}, **_name_rows(rows.requested)}

    def _collate_views(self, rows: DrawnRows) -> dict[str, Any]:
        with seeded_rng(*rows.key):
            batch = dict(self.collator(rows.samples))
        batch |= {DRAWN_PREFIX + "views": rows.views, **_name_rows(rows.requested)}
        if rows.geometry is not None:
            batch[DRAWN_PREFIX + "geometry"] = rows.geometry
        if rows.refused is not None:
            batch[DRAWN_PREFIX + "refused"] = rows.refused
        return batch


@dataclass(frozen=True)
class DrawnViews:
    """Samples and views of a live batch that is stored while it trains the model.

    Args:
        rows: which rows they are.
        views: view of each sample, int64 `(B,)`.
        geometry: the views' geometry `(B, G)`, zeros for base views; None if it was not requested or no transform
            returned it.
        refused: why a replayable transform could not return it; None if it could.

    Shapes: B samples, G numbers of a view's geometry.
    """

    rows: BatchRows
    views: torch.Tensor
    geometry: torch.Tensor | None = None
    refused: str | None = None


@dataclass(frozen=True)
class ReplayedBatch:
    """A batch from a store.

    Args:
        codes: by column.
        inputs: model inputs by name.
        rows: which rows they are.
    """

    codes: dict[str, torch.Tensor]
    inputs: dict[str, Any]
    rows: BatchRows


def take_drawn(batch: Mapping[str, Any]) -> tuple[DrawnViews, dict[str, Any]] | None:
    """Splits a live batch that is stored into its views and its model inputs.

    Args:
        batch: a collated batch.

    Returns:
        The views, and the model inputs by name; None for any other batch.
    """
    if not isinstance(batch, Mapping) or DRAWN_PREFIX + "views" not in batch:
        return None
    drawn, rest = _split(batch, DRAWN_PREFIX)
    rows, inputs = _split(rest, ROW_PREFIX)
    return DrawnViews(rows=BatchRows(**rows), **drawn), inputs


def take_codes(batch: Mapping[str, Any]) -> ReplayedBatch | None:
    """Splits a replayed batch into its codes, its model inputs and the rows that it holds.

    Args:
        batch: a collated batch.

    Returns:
        None for a live batch.
    """
    if not isinstance(batch, Mapping) or not any(is_code(name) for name in batch):
        return None
    codes, rest = _split(batch, CODE_PREFIX)
    rows, inputs = _split(rest, ROW_PREFIX)
    return ReplayedBatch(codes, inputs, BatchRows(**rows))


def take_lost(batch: Any) -> tuple[str, BatchRows] | None:
    """Why the rows of a batch could not be read from the store, and which rows they are; None for any other batch."""
    if not isinstance(batch, Mapping) or LOST not in batch:
        return None
    rows, _ = _split(batch, ROW_PREFIX)
    return batch[LOST], BatchRows(**rows)


def is_code(name: Any) -> bool:
    """Whether a batch entry holds codes."""
    return isinstance(name, str) and name.startswith(CODE_PREFIX)


def _split(batch: Mapping[str, Any], prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entries whose names have a prefix, without it, and the other entries."""
    named = {name: value for name, value in batch.items() if isinstance(name, str) and name.startswith(prefix)}
    others = {name: value for name, value in batch.items() if name not in named}
    return {name.removeprefix(prefix): value for name, value in named.items()}, others


def _name_rows(rows: BatchRows) -> dict[str, torch.Tensor]:
    return {ROW_PREFIX + field.name: getattr(rows, field.name) for field in fields(rows)}


def _collate_trimmed(rows: CachedRows, batch: Any) -> dict[str, Any]:
    """The batch as the user's collator pads it, with codes of features as wide as the widest sample."""
    why = why_other_samples(rows.rows, batch)
    if why is not None:
        return {LOST: why, **_name_rows(rows.requested)}
    main_input = PaddingRule.from_json(rows.rows[WIDEST]).main_input
    return _with_size(rows, batch, main_input, {name: rows.rows[name] for name in rows.codes})


def _collate_sized(rows: CachedRows, batch: Any) -> dict[str, Any]:
    """The batch as the user's collator makes it, with codes of features of its size."""
    why = why_other_sizes(rows.rows, batch)
    if why is not None:
        return {LOST: why, **_name_rows(rows.requested)}
    codes = {name: rows.rows[name].unflatten(0, (len(rows.rows[TOKENS]), -1)) for name in rows.codes}
    return _with_size(rows, batch, SizeRule.from_json(rows.rows[SIZES]).main_input, codes)


def _with_size(rows: CachedRows, batch: Any, main_input: str, codes: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """A batch with codes in the place of its main input, of whose numbers nobody reads the shape alone travels on."""
    main = batch[main_input]
    others = dict(batch) if stays_real(main) else {name: batch[name] for name in batch if name != main_input}
    codes = {**codes, SIZE: main.new_empty(*main.shape, 0)}
    return {**others, **{CODE_PREFIX + name: value for name, value in codes.items()}, **_name_rows(rows.requested)}


def _name_codes(rows: CachedRows) -> dict[str, Any]:
    named = {(CODE_PREFIX + name if name in rows.codes else name): value for name, value in rows.rows.items()}
    return named | _name_rows(rows.requested)


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
    samples = None if rows[0].samples is None else [row.samples[0] for row in rows]
    requested = BatchRows.merge([row.requested for row in rows])
    return CachedRows(merged, rows[0].codes, requested, samples, rows[0].texts)


def _merge_views(rows: list[DrawnRows]) -> DrawnRows:
    """Joins rows that were fetched one by one, each with one sample."""
    geometry = [row.geometry for row in rows if row.geometry is not None]
    return DrawnRows(
        [row.samples[0] for row in rows],
        BatchRows.merge([row.requested for row in rows]),
        torch.cat([row.views for row in rows]),
        torch.cat(geometry) if len(geometry) == len(rows) else None,
        next((row.refused for row in rows if row.refused is not None), None),
        rows[0].key,
    )
