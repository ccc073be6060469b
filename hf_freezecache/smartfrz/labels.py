"""From what moment on a block of a recorded training had settled, by hindsight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LabelRule:
    """When the CKA curve of a block with the finished model counts as settled.

    Args:
        level: CKA with the finished model, at least.
        spread: largest minus smallest value of the window, at most.
        window: snapshots, up to the one that is labelled.
    """

    level: float = 0.8
    spread: float = 0.1
    window: int = 5

    def __post_init__(self):
        if not 0 <= self.level <= 1 or not self.spread > 0 or self.window < 1:
            raise ValueError(f"{self}: level is from 0 to 1, spread more than 0, and window at least 1.")

    def settled(self, curves: np.ndarray) -> np.ndarray:
        """Labels of all snapshots: whether a block has settled by then, and has never stirred again.

        Args:
            curves: CKA with the finished model, `(S, L)`; NaN where an output does not tell samples apart.

        Returns:
            bool `(S, L)`; once true, true to the end.

        Shapes: S snapshots, L blocks.
        """
        curves = np.nan_to_num(curves, nan=0.0)
        calm = np.zeros(curves.shape, dtype=bool)
        for snapshot in range(len(curves)):
            recent = curves[max(0, snapshot - self.window + 1) : snapshot + 1]
            calm[snapshot] = (recent.min(0) >= self.level) & (recent.max(0) - recent.min(0) <= self.spread)
            if snapshot + 1 < self.window:
                calm[snapshot] = False
        return np.logical_and.accumulate(calm[::-1], axis=0)[::-1]
