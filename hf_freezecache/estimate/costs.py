"""Arithmetic of plans: what a store would cost and save, from the seconds that one range of samples takes.

Nothing here measures or writes. A range is a batch of the train loader. A build and a live epoch run the prefix over
every range; a replay epoch reads it from the store.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..units import format_table, show_bytes, show_epochs, show_seconds

#: What is saved must exceed what a build costs by this factor: both are estimates.
MARGIN = 1.05


@dataclass(frozen=True)
class Costs:
    """Seconds that one range of samples costs at one cut.

    Args:
        load: fetching and collating it as a live epoch does.
        prefix: a forward pass of the frozen blocks, transfer included.
        prefix_build: the same in a build, which sorts texts by length, or runs samples as wide as the widest; None: it
            takes as long.
        load_base: fetching and collating the base view, as a build does.
        load_view: the same for an augmented view, its geometry included.
        encode: encoding, writing and checking base view and all others.
        read: rows from a store, by random access.
        decode: rows to features, on the device: decoding, and for views warping and the channels' linear map.
        suffix: a training step of the rest: forward, backward and optimizer, or what it has in their place; None if
            it was not measured.
        compare: comparing a view with its base view, for choosing sensitive channels.
        run: what a build needs for one range, all views of it, where it does not run the prefix on samples.
        frame_bytes: mean size of a packed row's codes, by column; None where rows are not packed, or not yet measured.
        fixed: what a build costs once: proving the cut, fitting the codec, solving for the channels' linear map,
            starting loader processes, and making the files durable.
        peak_memory_bytes: of a replay step; None if it was not measured.
    """

    load: float
    prefix: float
    load_base: float
    prefix_build: float | None = None
    load_view: float = 0.0
    encode: float = 0.0
    read: float = 0.0
    decode: float = 0.0
    suffix: float | None = None
    compare: float = 0.0
    run: float | None = None
    fixed: float = 0.0
    frame_bytes: Mapping[str, float] | None = None
    peak_memory_bytes: int | None = None

    @property
    def build_prefix(self) -> float:
        """Forward pass of the frozen blocks in a build."""
        return self.prefix if self.prefix_build is None else self.prefix_build


@dataclass(frozen=True)
class Work:
    """How many ranges, views and processes there are.

    Args:
        ranges: of an epoch, all processes together; the last one may be a fraction.
        views: augmented views that a build loads.
        views_run: augmented views on which it runs the prefix.
        compared: ranges on which channels are compared, by the main process.
        run_twice: ranges on which the codec is fitted and whose features memory does not hold until they are written.
        workers: loader processes; they work while the model computes.
        processes: processes that train together.
        passes: forward passes of a live step.
        shared: samples that a build stores for each one of the training: more than 1 where it stores the data set that
            the samples are selected from.
    """

    ranges: float
    views: int = 0
    views_run: int = 0
    compared: int = 0
    run_twice: int = 0
    workers: int = 0
    processes: int = 1
    passes: int = 1
    shared: float = 1.0


@dataclass(frozen=True)
class PlanRow:
    """One cut.

    Args:
        cut: frozen blocks.
        block: name of the last of them.
        codec: name of the codec.
        base_bytes: of the Arrow files, what the base views take.
        view_bytes: of the Arrow files, what the augmented views take.
        build_seconds: of building the store.
        live_epoch_seconds: of an epoch with this cut frozen, from samples.
        replay_epoch_seconds: of an epoch from the store.
        live_step_seconds: of one batch with this cut frozen, from samples.
        replay_step_seconds: of one batch from the store.
        peak_memory_bytes: of a replay step; None if it was not measured.
        limit: bytes that the store may take; None if that is not known.
        most_bytes: of the Arrow files, the most that they can take where rows are packed; None: they take `bytes`.
        shared: as in `Work`. Other trainings read the other samples, and bear their part of the build.

    Where the suffix was not measured, steps and epochs lack it; what is saved is right.
    """

    cut: int
    block: str
    codec: str
    base_bytes: int
    view_bytes: int
    build_seconds: float
    live_epoch_seconds: float
    replay_epoch_seconds: float
    live_step_seconds: float
    replay_step_seconds: float
    peak_memory_bytes: int | None = None
    limit: int | None = None
    most_bytes: int | None = None
    shared: float = 1.0

    @property
    def bytes(self) -> int:
        """Of the Arrow files; estimated where rows are packed."""
        return self.base_bytes + self.view_bytes

    @property
    def needed(self) -> int:
        """Bytes that must be there for the Arrow files before they are built."""
        return self.bytes if self.most_bytes is None else self.most_bytes

    @property
    def seconds_saved_per_epoch(self) -> float:
        """What a replay epoch takes less than a live one at the same cut; negative if it takes longer."""
        return self.live_epoch_seconds - self.replay_epoch_seconds

    @property
    def own_build_seconds(self) -> float:
        """The part of the build that the training's own samples take."""
        return self.build_seconds / self.shared

    @property
    def break_even_epochs(self) -> float:
        """Replay epochs after which the build has paid for itself; infinite if it never does."""
        saved = self.seconds_saved_per_epoch
        return self.own_build_seconds / saved if saved > 0 else math.inf

    @property
    def fits(self) -> bool:
        """Whether budget and disk hold the store."""
        return self.limit is None or self.needed <= self.limit

    @property
    def verdict(self) -> str:
        """One phrase for a person."""
        if self.limit is not None and not self.fits:
            return f"does not fit: needs {show_bytes(self.needed)}, {show_bytes(self.limit)} left"
        if self.seconds_saved_per_epoch <= 0:
            return "does not pay: a replay step is no faster"
        epochs = math.floor(self.break_even_epochs * MARGIN) + 1
        return f"pays after {show_epochs(epochs)}"


@dataclass(frozen=True)
class Plan:
    """What every cut would cost and save; `str(plan)` is a table.

    Args:
        rows: one a cut.
        live_step_seconds: of one batch of plain training, nothing frozen.
        live_epoch_seconds: of an epoch of plain training.
        probed: what was measured, in words.
    """

    rows: tuple[PlanRow, ...]
    live_step_seconds: float
    live_epoch_seconds: float
    probed: str

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values, what follows from its rows included; None for what is infinite."""
        derived = ("bytes", "needed", "seconds_saved_per_epoch", "break_even_epochs", "verdict")
        rows = [{**asdict(row), **{name: getattr(row, name) for name in derived}} for row in self.rows]
        finite = [{name: None if value == math.inf else value for name, value in row.items()} for row in rows]
        return {**asdict(self), "rows": finite}

    def __str__(self) -> str:
        table = format_table([_HEADER, *(_cells(row) for row in self.rows)], [_HEADER.index(name) for name in _LEFT])
        plain = (
            f"Plain training, nothing frozen: {show_seconds(self.live_step_seconds)} a step, "
            f"{show_seconds(self.live_epoch_seconds)} an epoch."
        )
        return "\n".join([table, plain, self.probed])


_HEADER = (
    "cut",
    "last frozen block",
    "codec",
    "store",
    "of it views",
    "build",
    "live epoch",
    "replay epoch",
    "saved an epoch",
    "replay step",
    "peak memory",
    "verdict",
)
_LEFT = ("last frozen block", "codec", "verdict")


def _cells(row: PlanRow) -> tuple[str, ...]:
    return (
        str(row.cut),
        row.block,
        row.codec,
        show_bytes(row.bytes),
        show_bytes(row.view_bytes),
        show_seconds(row.build_seconds),
        show_seconds(row.live_epoch_seconds),
        show_seconds(row.replay_epoch_seconds),
        show_seconds(row.seconds_saved_per_epoch),
        show_seconds(row.replay_step_seconds),
        "-" if row.peak_memory_bytes is None else show_bytes(row.peak_memory_bytes),
        row.verdict,
    )


def make_row(
    *,
    cut: int,
    block: str,
    codec: str,
    base_bytes: int,
    view_bytes: int,
    costs: Costs,
    work: Work,
    limit: int | None,
    most_bytes: int | None = None,
) -> PlanRow:
    """Extends the costs of one range to the whole build and to epochs.

    Args:
        costs: seconds of one range.
        work: how many ranges there are.
        cut, block, codec, base_bytes, view_bytes, limit, most_bytes: fields of the row, see `PlanRow`.
    """
    live, replay = step_seconds(costs, work.workers, work.passes)
    ranges = work.ranges / work.processes
    # The sentinel rows of a replay epoch run live, a batch at most: a base view and, if there are any, one more.
    views = min(work.views, 1)
    sentinels = costs.load_base + costs.prefix + views * (costs.load_view + costs.prefix)
    return PlanRow(
        cut=cut,
        block=block,
        codec=codec,
        base_bytes=base_bytes,
        view_bytes=view_bytes,
        build_seconds=build_seconds(costs, work),
        live_epoch_seconds=ranges * live,
        replay_epoch_seconds=ranges * replay + sentinels,
        live_step_seconds=live,
        replay_step_seconds=replay,
        peak_memory_bytes=costs.peak_memory_bytes,
        limit=limit,
        most_bytes=most_bytes,
        shared=work.shared,
    )


def build_seconds(costs: Costs, work: Work) -> float:
    """Seconds of a build: choosing the sensitive channels, fitting the codec, and one pass over all ranges."""
    if costs.run is None:
        compute, load = costs.build_prefix * (1 + work.views_run), costs.load_base + work.views * costs.load_view
        compared = overlapped(2 * costs.prefix + costs.compare, costs.load_base + costs.load_view, work.workers)
    else:
        compute, load = costs.run, 0.0
        # One augmented view is compared, whatever the number of views.
        compared = costs.run * 2 / (1 + max(1, work.views)) + costs.compare
    one_pass = overlapped(compute + costs.encode, load, work.workers) * work.ranges * work.shared / work.processes
    twice = overlapped(compute, load, work.workers) * work.run_twice
    return costs.fixed + work.compared * compared + twice + one_pass


def step_seconds(costs: Costs, workers: int, passes: int = 1) -> tuple[float, float]:
    """Seconds of one batch with the cut frozen: from samples, and from a store.

    From samples, every forward pass of a step runs the frozen blocks; a store is read once.

    Where the suffix was not measured, both lack it. With loader processes they then lack loading too, as it is hidden
    behind the computation or, where it is not, a store saves even more.
    """
    if costs.suffix is None and workers:
        return passes * costs.prefix, costs.decode
    suffix = costs.suffix or 0.0
    live = overlapped(passes * costs.prefix + suffix, costs.load, workers)
    return live, overlapped(costs.decode + suffix, costs.read, workers)


def overlapped(compute: float, load: float, workers: int) -> float:
    """Seconds of a batch that loader processes prepare while the one before is computed; one after the other at 0."""
    return max(compute, load / workers) if workers else compute + load


def runs_of_prefix(work: Work) -> float:
    """How many times a build from samples runs the prefix over all samples: once, and again for every view.

    An epoch that is left saves one such run at most for each forward pass of a step: no measurement is needed to
    decline a build for fewer epochs.

    Args:
        work: of the build.
    """
    ranges = work.ranges / work.processes
    compared = 2 * work.compared / ranges if ranges else 0.0
    return 1 + work.views_run + compared + work.run_twice / ranges


def decide(row: PlanRow, epochs_left: float, limit: int | None = None) -> str | None:
    """Whether to build.

    Args:
        row: what the build would cost and save.
        epochs_left: epochs of training that remain.
        limit: bytes that the store may take; None: the row's own.

    Returns:
        None; or why not, in one phrase.
    """
    limit = row.limit if limit is None else limit
    if limit is not None and row.needed > limit:
        return f"it needs {show_bytes(row.needed)}, and {show_bytes(limit)} are left"
    saved = row.seconds_saved_per_epoch
    if saved <= 0:
        return "a replay step would be no faster than a live one"
    if saved * epochs_left <= MARGIN * row.own_build_seconds:
        left = f"the {show_epochs(epochs_left)} left would save {show_seconds(saved * epochs_left)}"
        return f"a build takes about {show_seconds(row.own_build_seconds)}, and {left}"
    return None
