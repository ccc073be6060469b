"""The widest sample of a data set, beside which a collator pads all others to one width; and how it pads them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from transformers.utils import logging

from ..cache.padded import BesideWidest, PaddedEntry, PaddingRule
from ..cache.rows import RowError, RowSource, is_same
from ..rng import preserve_rng
from .materialize import spread

logger = logging.get_logger(__name__)

#: Samples that are collated alone, to know their widths.
_ALONE = 16
#: Sides on which padding may be, and how it is called where both are possible.
_SIDES = ("right", "left")
#: Stands for an entry of which it is not known how it is padded.
_UNKNOWN = object()


def widened(source: RowSource, main_input: str, read: Collection[str], widest: int | None = None) -> RowSource:
    """The same samples as batches that all are as wide as the widest sample; `source` keeps it for the next call.

    Args:
        source: the samples, which the collator pads to the widest of a batch.
        main_input: name of the model's main input in a batch.
        read: names of all that the frozen blocks read.
        widest: row number of the widest; None: it is looked for, in all samples.

    Raises:
        RowError: if it cannot be told how the collator pads.
        Exception: whatever the collator raises.
    """
    rule = None if source.wide is None else source.wide.rule
    known = rule.entries.keys() if isinstance(rule, PaddingRule) else set()
    if source.wide is None or not set(read) <= known:
        row = widest_of(source, main_input) if widest is None else widest
        source.wide = _widen(source, main_input, {*read, *known}, row)
    return source.wide


def widest_of(source: RowSource, main_input: str) -> int:
    """Row number of the widest sample; all are drawn once for it, in the loader's processes.

    Args:
        source: the samples.
        main_input: name of the model's main input in a batch.

    Raises:
        Exception: whatever the collator raises.
    """
    if source.wide is not None and isinstance(source.wide.collator, BesideWidest):
        return source.wide.collator.widest
    logger.info(f"Looking for the widest of {len(source)} samples.")
    largest, number = -1, 0
    with preserve_rng():
        for each, (drawn,) in source.loader(range(source.num_ranges)):
            size = _values(drawn.batch, main_input)
            if size > largest:
                largest, number = size, each
        return max(source.rows(number), key=lambda row: _values(source.collate([row]), main_input))


def rows_by_width(source: RowSource, main_input: str, most: int = _ALONE) -> list[int]:
    """Rows from all over a data set, the narrowest first, by what each is alone.

    Args:
        source: the samples.
        main_input: name of the model's main input in a batch.
        most: number of rows.

    Raises:
        Exception: whatever the collator raises.
    """
    return sort_by_width(source, main_input, spread(len(source), min(most, len(source))))


def sort_by_width(source: RowSource, main_input: str, rows: Sequence[int]) -> list[int]:
    """Some rows, the narrowest first, by what each is alone.

    Args:
        source: the samples.
        main_input: name of the model's main input in a batch.
        rows: their numbers.

    Raises:
        Exception: whatever the collator raises.
    """
    with preserve_rng():
        return sorted(rows, key=lambda row: _values(source.collate([row]), main_input))


def narrow_batch(source: RowSource, main_input: str) -> Mapping[str, Any]:
    """The narrower half of a few samples from all over a data set, collated together.

    Args:
        source: the samples.
        main_input: name of the model's main input in a batch.

    Raises:
        Exception: whatever the collator raises.
    """
    rows = rows_by_width(source, main_input)
    with preserve_rng():
        return source.collate(rows[: max(2, len(rows) // 2)][:: max(1, len(rows) // 8)])


def _widen(source: RowSource, main_input: str, read: Collection[str], widest: int) -> RowSource:
    wide = source.collated_by(BesideWidest(source.collator, source.dataset, widest))
    with preserve_rng():
        narrowest = rows_by_width(source, main_input)[: max(2, _ALONE // 4)]
        beside = wide.collate(narrowest)
        alone = [source.collate([row]) for row in narrowest]
    wide.rule = _find_rule(beside, alone, main_input, read)
    return wide


def _find_rule(
    beside: Mapping[str, Any], alone: Sequence[Mapping[str, Any]], main_input: str, read: Collection[str]
) -> PaddingRule:
    """How samples are padded, by what they are beside the widest and alone."""
    missing = sorted(set(read) - beside.keys())
    if missing:
        raise RowError(
            f"the frozen blocks read '{missing[0]}', which the collator does not return: whether it changes cannot be "
            "seen. Return it from the collator, not from `_prepare_inputs`."
        )
    unknown: list[str] = []
    for side in _SIDES:
        entries = {name: _find_entry(beside[name], [each[name] for each in alone], side) for name in read}
        main = entries[main_input]
        for name, entry in entries.items():
            if isinstance(main, PaddedEntry) and isinstance(entry, PaddedEntry):
                # What grows with something else than the main input has a width of its own.
                pairs = ((each[name], each[main_input]) for each in [beside, *alone])
                if any(own.shape[1 + entry.dim] != other.shape[1 + main.dim] for own, other in pairs):
                    entries[name] = _UNKNOWN
        known = {name: entry for name, entry in entries.items() if isinstance(entry, PaddedEntry | None)}
        if len(known) == len(entries) and known[main_input] is not None:
            return PaddingRule(main_input, side, tuple(beside[main_input].shape[1:]), known)
        others = sorted(entries.keys() - known.keys()) or [main_input]
        unknown = others if not unknown or len(others) < len(unknown) else unknown
    raise RowError(
        f"it cannot be told how the collator pads '{unknown[0]}': what a sample has of it alone does not stand at the "
        "beginning or the end of what it has beside a wider one, with one value at the padding, or it is not as wide "
        f"as '{main_input}'"
    )


def _find_entry(beside: Any, alone: Sequence[Any], side: str) -> object:
    """How an entry is padded on a side; None: it has no width."""
    values = [beside, *alone]
    if not all(isinstance(value, torch.Tensor) and value.ndim for value in values) or len(beside) != len(alone):
        is_per_sample = isinstance(beside, (list, tuple)) and len(beside) == len(alone)
        return None if is_per_sample or all(is_same(beside, value) for value in alone) else _UNKNOWN
    if any(len(value) != 1 or value.ndim != beside.ndim for value in alone):
        return _UNKNOWN
    dims = {
        dim
        for value in alone
        for dim, (own, other) in enumerate(zip(value.shape[1:], beside.shape[1:], strict=True))
        if own != other
    }
    if len(dims) != 1:
        return _UNKNOWN if dims else None
    (dim,) = dims
    fillings = []
    for whole, (own,) in zip(beside, alone, strict=True):
        size, most = own.shape[dim], whole.shape[dim]
        if size > most:
            return _UNKNOWN
        first = 0 if side == "right" else most - size
        if not torch.equal(whole.narrow(dim, first, size), own):
            return _UNKNOWN
        fillings.append(whole.narrow(dim, size if side == "right" else 0, most - size).reshape(-1))
    filling = torch.cat(fillings)
    return PaddedEntry(dim, filling[0].item()) if len(filling) and bool((filling == filling[0]).all()) else _UNKNOWN


def _values(batch: Any, main_input: str) -> int:
    """Numbers of the main input of a sample, padding included."""
    main = batch.get(main_input) if isinstance(batch, Mapping) else None
    if not isinstance(main, torch.Tensor):
        raise RowError(f"the collator returns no tensor '{main_input}'.")
    return main[:1].numel()
