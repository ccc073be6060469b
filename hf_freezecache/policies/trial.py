"""What a trial before the training has found: losses with some blocks frozen and with all of them live."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
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

    def describe(self) -> str:
        """A clause for the log."""
        return (
            f"after {self.steps} steps on trial the loss on {self.samples} held-out training samples is "
            f"{statistics.fmean(self.frozen):.4g} with {self.cut} frozen blocks and {statistics.fmean(self.live):.4g} "
            f"without (difference {self.difference:+.3g}, standard error {self.error:.2g})"
        )
