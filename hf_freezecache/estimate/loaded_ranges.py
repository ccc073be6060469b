"""A few ranges of samples in memory, and how long they took to load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median_low

from ..build.materialize import spread
from ..cache.rows import DrawnBatch, RowSource
from ..cache.sized import SizedBatch, SizeRule
from .trial_steps import timed


@dataclass(frozen=True)
class LoadedRanges:
    """A few ranges in memory.

    Args:
        rows: their row numbers.
        base: base views; where samples have sizes of their own, as many samples of one size as a range has.
        views: first augmented view of each; empty if none are kept.
        live: seconds of a live epoch's draw.
        base_seconds: of every base view.
        view_seconds: of every augmented view, its geometry included.
        stored: the base views as a build draws them.
    """

    rows: list[Sequence[int]]
    base: list[DrawnBatch]
    views: list[DrawnBatch]
    live: float
    base_seconds: list[float]
    view_seconds: list[float]
    stored: list[DrawnBatch]


def load_ranges(
    source: RowSource,
    count: int,
    with_views: bool,
    geometry: tuple[str, tuple[int, int]] | None,
    as_views: bool,
    wide: RowSource | None = None,
) -> LoadedRanges:
    """Draws some ranges from all over the data, and times it.

    Args:
        source: the samples.
        count: of ranges.
        with_views: draw an augmented view of each, too.
        geometry: kind and grid of the views' geometry; None: none is asked for.
        as_views: live epochs draw views, and not what base views are.
        wide: the same samples as a build draws them, where that is in other batches than an epoch; else None.
    """
    whole = max(1, len(source) // source.batch_size)
    rows = [source.rows(number) for number in spread(whole, count)]
    base, views, base_seconds, view_seconds = [], [], [], []
    live_rows = rows if wide is None else [_like_an_epoch(wide, each) for each in rows]
    for each in live_rows:
        drawn, seconds = timed(partial(source.draw, each))
        base.append(drawn)
        base_seconds.append(seconds)
        if with_views:
            drawn, seconds = timed(partial(source.draw, each, 1, geometry))
            views.append(drawn)
            view_seconds.append(seconds)
    live, stored = median_low(base_seconds), base
    if wide is not None:
        drawn_wide = [timed(partial(wide.draw, each)) for each in rows]
        stored, base_seconds = [drawn for drawn, _ in drawn_wide], [seconds for _, seconds in drawn_wide]
    if as_views:
        live = median_low([timed(partial(source.draw, each, 1))[1] for each in live_rows[:2]])
    return LoadedRanges(rows, base, views, live, base_seconds, view_seconds, stored)


def _like_an_epoch(wide: RowSource, rows: Sequence[int]) -> Sequence[int]:
    """As many rows as an epoch has in a batch: of the most common size of a range, if these have several."""
    batch = wide.collate(rows) if isinstance(wide.rule, SizeRule) else None
    if not isinstance(batch, SizedBatch):
        return rows
    places, _ = max(batch.parts, key=lambda part: len(part[0]))
    return [rows[places[number % len(places)]] for number in range(len(rows))]
