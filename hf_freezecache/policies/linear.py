"""Freezing in equal steps during a part of the training."""

from __future__ import annotations

from .base import FreezePolicy, Moment
from .schedule import FreezePoint, next_change, scheduled_changes, scheduled_cut


class LinearPolicy(FreezePolicy):
    """Freezes a share of the blocks in equal steps between two points of the training.

    Stage j of n sets `cut = round(max_frozen * blocks * j / n)` at the fraction
    `start + (end - start) * (j - 1) / max(n - 1, 1)` of the training, rounded up to an epoch.

    Args:
        start: fraction of the training at which the first stage freezes.
        end: fraction of the training at which the last stage freezes.
        max_frozen: fraction of the blocks that are frozen after the last stage.
        stages: number of stages.
    """

    def __init__(self, start: float = 0.25, end: float = 0.5, max_frozen: float = 0.75, stages: int = 2):
        self.begin, self.end, self.max_frozen, self.stages = start, end, max_frozen, stages

    def points(self, num_blocks: int) -> list[FreezePoint]:
        """The schedule for a chain of `num_blocks` blocks."""
        return [
            FreezePoint(
                when=float(self.begin + (self.end - self.begin) * (stage - 1) / max(self.stages - 1, 1)),
                cut=round(self.max_frozen * num_blocks * stage / self.stages),
            )
            for stage in range(1, self.stages + 1)
        ]

    name = "linear"

    def describe(self) -> str:
        return (
            f"linear, freeze_start={self.begin}, freeze_end={self.end}, max_frozen={self.max_frozen}, "
            f"freeze_stages={self.stages}"
        )

    def changes(self, num_blocks: int, num_epochs: int) -> list[tuple[int, int]]:
        return scheduled_changes(self.points(num_blocks), num_epochs)

    def decide(self, moment: Moment) -> int:
        return scheduled_cut(self.points(moment.num_blocks), moment.epoch, moment.num_epochs)

    def next_change(self, moment: Moment) -> int | None:
        return next_change(self.points(moment.num_blocks), moment.epoch, moment.num_epochs, moment.cut)
