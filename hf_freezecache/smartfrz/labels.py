"""From what moment on a block of a recorded training had settled, by hindsight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LabelRule:
    """When the output of a block counts as that of the finished model.

    The distance of a block is 1 minus the CKA of its output with that of the finished model. It depends on the kind of
    training: from an initialization it begins at a half, in a fine-tuning at a few hundredths. So it is compared with
    the largest that the block has had.

    Args:
        remaining: share of that largest distance, at most.
        floor: distance that is small whatever the largest was.
        window: snapshots over which distances are averaged, as one reading is noisy.
    """

    remaining: float = 0.02
    floor: float = 0.005
    window: int = 3

    def __post_init__(self):
        if not 0 < self.remaining < 1 or not 0 <= self.floor < 1 or self.window < 1:
            raise ValueError(f"{self}: remaining and floor are shares, between 0 and 1, and window is at least 1.")

    def settled(self, curves: np.ndarray) -> np.ndarray:
        """Labels of all snapshots: whether a block is near its end by then, and stays there.

        Args:
            curves: CKA with the finished model, `(S, L)`; NaN where an output does not tell samples apart.

        Returns:
            bool `(S, L)`; once true, true to the end.

        Shapes: S snapshots, L blocks.
        """
        distances = 1 - np.nan_to_num(curves, nan=0.0)
        means = np.stack(
            [distances[max(0, place - self.window + 1) : place + 1].mean(0) for place in range(len(distances))]
        )
        near = means <= np.maximum(self.floor, self.remaining * distances.max(0))
        return np.logical_and.accumulate(near[::-1], axis=0)[::-1]
