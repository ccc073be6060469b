"""Freezing at epochs that the user names."""

from __future__ import annotations

from .base import FreezePolicy, Moment
from .schedule import next_change, parse_freeze_points, planned_cuts, scheduled_cut


class ManualPolicy(FreezePolicy):
    """Freezes at the epochs, or fractions of the training, that the user names.

    Args:
        freeze_points: e.g. `"1:4,3:8"`, see `parse_freeze_points`.

    Raises:
        ValueError: if the text is not understood.
    """

    def __init__(self, freeze_points: str):
        self.text = freeze_points
        self.points = parse_freeze_points(freeze_points)

    def start(self, num_blocks: int) -> None:
        deepest = max(point.cut for point in self.points)
        if deepest > num_blocks:
            raise ValueError(
                f"freeze_points={self.text!r} asks for cut {deepest}, but the model has {num_blocks} blocks (stem "
                f"included): the deepest cut is {num_blocks}, which trains the head only."
            )

    def decide(self, moment: Moment) -> int:
        return scheduled_cut(self.points, moment.epoch, moment.num_epochs)

    def next_change(self, moment: Moment) -> int | None:
        return next_change(self.points, moment.epoch, moment.num_epochs, moment.cut)

    def planned_cuts(self, num_blocks: int, num_epochs: int) -> list[int]:
        return planned_cuts(self.points, num_epochs)
