"""What a trial before the training has found, losses with some blocks frozen and with none, and what a rule chose."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Trial:
    """Two short trainings from the same weights, over the same training samples, and their losses on held-out ones.

    Args:
        cut: frozen blocks of the one; the other has none.
        steps: optimizer steps of each.
        samples: held-out training samples.
        frozen, live: mean losses of held-out batches after either, batch by batch.
    """

    cut: int
    steps: int
    samples: int
    frozen: Sequence[float]
    live: Sequence[float]

    @property
    def difference(self) -> float:
        """By how much the loss is larger with frozen blocks."""
        return statistics.fmean(self._differences)

    @property
    def error(self) -> float:
        """Standard error of the difference, by batches; 0 if there is one batch only."""
        differences = self._differences
        return statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0

    @property
    def _differences(self) -> list[float]:
        return [frozen - live for frozen, live in zip(self.frozen, self.live, strict=True)]

    def numbers(self) -> dict[str, float | None]:
        """What was found, by name; a number that is not finite is None."""
        found = {
            "cut": self.cut,
            "steps": self.steps,
            "held_out_samples": self.samples,
            "frozen_loss": statistics.fmean(self.frozen),
            "live_loss": statistics.fmean(self.live),
            "difference": self.difference,
            "standard_error": self.error,
        }
        return {name: value if math.isfinite(value) else None for name, value in found.items()}

    def describe(self) -> str:
        """A clause for the log."""
        return (
            f"after {self.steps} steps on trial the loss on {self.samples} held-out training samples is "
            f"{statistics.fmean(self.frozen):.4g} with {self.cut} frozen blocks and {statistics.fmean(self.live):.4g} "
            f"without (difference {self.difference:+.3g}, standard error {self.error:.2g})"
        )


@dataclass(frozen=True)
class Choice:
    """The schedule that a rule has chosen for a training, and why.

    Args:
        policy: name of the rule.
        schedule: what it has chosen, as `freeze_points` are written.
        why: a sentence, with the numbers.
        numbers: of the trial that it was chosen by, by name, see `Trial.numbers`; empty if there was none.
    """

    policy: str
    schedule: str
    why: str
    numbers: Mapping[str, float | None]

    def describe(self) -> str:
        """A line for the report."""
        return f"policy {self.policy} has chosen '{self.schedule}'. {self.why}"
