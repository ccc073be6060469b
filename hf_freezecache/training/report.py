"""What a person reads: the state of a training and what it has cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

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


@dataclass(frozen=True)
class Totals:
    """Sums over phases. `train_seconds` is live and replay, `seconds` everything, evaluation included."""

    seconds: float
    train_seconds: float
    build_seconds: float
    eval_seconds: float
    flops: float
    eval_flops: float
    peak_memory_bytes: int


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
    """What a training has cost, by phase; `str(report)` is a table."""

    phases: list[Phase]
    totals: Totals
    plain_estimate: PlainEstimate

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [("cut", "mode", "epochs", "steps", "seconds", "GFLOPs", "store MB", "peak MB")]
        for phase in self.phases:
            rows.append(
                (
                    str(phase.cut),
                    phase.mode,
                    str(phase.epochs),
                    str(phase.steps),
                    f"{phase.seconds:.1f}",
                    f"{phase.flops / 1e9:.1f}",
                    f"{phase.store_bytes / 1e6:.1f}",
                    f"{phase.peak_memory_bytes / 1e6:.0f}",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        totals, plain = self.totals, self.plain_estimate
        trained = totals.train_seconds + totals.build_seconds
        lines.append(
            f"training {trained:.1f} s (of it builds {totals.build_seconds:.1f} s), {totals.flops / 1e9:.1f} GFLOPs"
        )
        if plain.seconds is not None:
            lines.append(f"plain training, estimated: {plain.seconds:.1f} s, {plain.flops / 1e9:.1f} GFLOPs")
        elif plain.flops is not None:
            lines.append(f"plain training, estimated: {plain.flops / 1e9:.1f} GFLOPs")
        return "\n".join(lines)


def make_report(phases: list[Phase], plain_flops_per_step: float | None) -> FreezeCacheReport:
    """Sums up a training.

    Args:
        phases: from the ledger.
        plain_flops_per_step: FLOPs of an average optimizer step at cut 0.
    """
    training = [phase for phase in phases if phase.mode in ("live", "replay")]
    builds = [phase for phase in phases if phase.mode == "build"]
    evaluations = [phase for phase in phases if phase.mode == "eval"]
    steps = sum(phase.steps for phase in training)
    totals = Totals(
        seconds=sum(phase.seconds for phase in phases),
        train_seconds=sum(phase.seconds for phase in training),
        build_seconds=sum(phase.seconds for phase in builds),
        eval_seconds=sum(phase.seconds for phase in evaluations),
        flops=sum(phase.flops for phase in training + builds),
        eval_flops=sum(phase.flops for phase in evaluations),
        peak_memory_bytes=max((phase.peak_memory_bytes for phase in phases), default=0),
    )
    plain = next((phase for phase in training if phase.cut == 0 and phase.mode == "live" and phase.steps), None)
    estimate = PlainEstimate(
        seconds=None if plain is None else plain.seconds / plain.steps * steps,
        flops=None if plain_flops_per_step is None else plain_flops_per_step * steps,
    )
    return FreezeCacheReport(list(phases), totals, estimate)


def count_trainable(model: nn.Module) -> int:
    """Number of parameter values that get a gradient."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
