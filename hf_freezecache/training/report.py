"""What a person reads: the state of a training and what it has cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..cache.store import FeatureStore
from ..model.chain import BlockChain
from ..policies import Choice
from ..units import format_table, show_bytes, show_flops, show_seconds
from .accounting import Phase


@dataclass(frozen=True)
class FreezeStatus:
    """Where a training stands.

    Args:
        cut: frozen blocks, counted from the input.
        frozen_blocks: their module names.
        trainable_parameters: number of parameter values that still get a gradient.
        replaying: whether batches come from a store.
        store_path: the store in use.
        store_bytes: size of its Arrow files.
    """

    cut: int
    frozen_blocks: list[str]
    trainable_parameters: int
    replaying: bool
    store_path: Path | None
    store_bytes: int

    @classmethod
    def of(cls, chain: BlockChain, store: FeatureStore | None) -> FreezeStatus:
        """That of a training whose running epoch reads a store, or samples."""
        return cls(
            cut=chain.cut,
            frozen_blocks=chain.names[: chain.cut],
            trainable_parameters=count_trainable(chain.model),
            replaying=store is not None,
            store_path=None if store is None else store.path,
            store_bytes=0 if store is None else store.bytes,
        )


@dataclass(frozen=True)
class Totals:
    """Sums over phases. `train_seconds` is live and replay, `seconds` everything, evaluation included;
    `plan_seconds` were spent on stores that were not built, `head_start_seconds` on the head alone, `trial_seconds` on
    steps on trial before the training."""

    seconds: float
    train_seconds: float
    build_seconds: float
    eval_seconds: float
    flops: float
    eval_flops: float
    peak_memory_bytes: int
    plan_seconds: float = 0.0
    head_start_seconds: float = 0.0
    trial_seconds: float = 0.0


@dataclass(frozen=True)
class PlainEstimate:
    """What the same steps would have cost without freezing.

    Args:
        seconds: from the measured live steps at cut 0, evaluation apart; None if there were none.
        flops: from the measured FLOPs of a step at cut 0; None if nothing was trained.
    """

    seconds: float | None
    flops: float | None


@dataclass(frozen=True)
class FreezeCacheReport:
    """What a training has cost, by phase; `str(report)` is a table.

    Args:
        phases: in the order in which they began.
        totals: their sums.
        plain_estimate: what the same steps would have cost without freezing.
        note: why nothing was booked; None if something was.
        learning_rates: what was done to the learning rates of blocks; None if nothing was.
        choice: the schedule that the policy has chosen, why, and the numbers of its trial; None if it does not choose.
    """

    phases: list[Phase]
    totals: Totals
    plain_estimate: PlainEstimate
    note: str | None = None
    learning_rates: str | None = None
    choice: Choice | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        if not self.phases:
            return f"nothing was booked: {self.note}"
        header = ("cut", "mode", "epochs", "steps", "time", "compute", "store", "peak memory")
        table = format_table([header, *map(_cells, self.phases)], left=[header.index("mode")])
        totals, plain = self.totals, self.plain_estimate
        parts = {
            "head start": totals.head_start_seconds,
            "trial": totals.trial_seconds,
            "builds": totals.build_seconds,
            "plans of stores that were not built": totals.plan_seconds,
        }
        training = totals.train_seconds + sum(parts.values())
        of_it = ", ".join(f"{name} {show_seconds(seconds)}" for name, seconds in parts.items() if seconds)
        of_it = f" (of it {of_it})" if of_it else ""
        lines = [f"training: {show_seconds(training)}{of_it}, {show_flops(totals.flops)}"]
        estimate = [] if plain.seconds is None else [show_seconds(plain.seconds)]
        estimate += [] if plain.flops is None else [show_flops(plain.flops)]
        if estimate:
            lines.append(f"plain training, estimated: {', '.join(estimate)}")
        lines += [] if self.learning_rates is None else [self.learning_rates]
        lines += [] if self.choice is None else [self.choice.describe()]
        return "\n".join([table, *lines])


def _cells(phase: Phase) -> tuple[str, ...]:
    return (
        str(phase.cut),
        phase.mode,
        str(phase.epochs),
        str(phase.steps),
        show_seconds(phase.seconds),
        show_flops(phase.flops),
        show_bytes(phase.store_bytes),
        show_bytes(phase.peak_memory_bytes),
    )


def make_report(phases: list[Phase], plain_flops_per_step: float | None, note: str | None = None) -> FreezeCacheReport:
    """Sums up a training.

    Args:
        phases: from the ledger.
        plain_flops_per_step: FLOPs of an average optimizer step at cut 0.
        note: why nothing was booked.
    """
    training = [phase for phase in phases if phase.mode in ("live", "replay")]
    builds = [phase for phase in phases if phase.mode == "build"]
    planning = [phase for phase in phases if phase.mode == "plan"]
    evaluations = [phase for phase in phases if phase.mode == "eval"]
    head_starts = [phase for phase in phases if phase.mode == "head_start"]
    trials = [phase for phase in phases if phase.mode == "trial"]
    steps = sum(phase.steps for phase in training)
    totals = Totals(
        seconds=sum(phase.seconds for phase in phases),
        train_seconds=sum(phase.seconds for phase in training),
        build_seconds=sum(phase.seconds for phase in builds),
        eval_seconds=sum(phase.seconds for phase in evaluations),
        plan_seconds=sum(phase.seconds for phase in planning),
        head_start_seconds=sum(phase.seconds for phase in head_starts),
        trial_seconds=sum(phase.seconds for phase in trials),
        flops=sum(phase.flops for phase in training + builds + planning + head_starts + trials),
        eval_flops=sum(phase.flops for phase in evaluations),
        peak_memory_bytes=max((phase.peak_memory_bytes for phase in phases), default=0),
    )
    plain = next((phase for phase in training if phase.cut == 0 and phase.mode == "live" and phase.steps), None)
    estimate = PlainEstimate(
        seconds=None if plain is None else plain.seconds / plain.steps * steps,
        flops=None if plain_flops_per_step is None else plain_flops_per_step * steps,
    )
    return FreezeCacheReport(list(phases), totals, estimate, note)


def epoch_numbers(report: FreezeCacheReport, phase: Phase) -> dict[str, float]:
    """What is logged beside the loss.

    Args:
        report: of the training so far.
        phase: of the running epoch.

    Returns:
        By name: `freeze/cut` (frozen blocks), `freeze/replaying` (0 or 1), `freeze/cache_gb` (of the store that it has
        read, in 10^9 bytes), `freeze/flops_saved` (share of what the steps so far would have taken without freezing,
        builds counted), and `freeze/step_speedup` (a live step without frozen blocks over a step of this epoch, in
        seconds) where there was one of both.
    """
    is_replay = phase.mode == "replay"
    numbers: dict[str, float] = {"freeze/cut": phase.cut, "freeze/replaying": int(is_replay)}
    numbers["freeze/cache_gb"] = phase.store_bytes / 1e9 if is_replay else 0.0
    if report.plain_estimate.flops:
        numbers["freeze/flops_saved"] = 1 - report.totals.flops / report.plain_estimate.flops
    plain = next((each for each in report.phases if each.cut == 0 and each.mode == "live" and each.steps), None)
    if plain is not None and phase.steps and phase.seconds:
        numbers["freeze/step_speedup"] = plain.seconds / plain.steps / (phase.seconds / phase.steps)
    return numbers


def count_trainable(model: nn.Module) -> int:
    """Number of parameter values that get a gradient."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
