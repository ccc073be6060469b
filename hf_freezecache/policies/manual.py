"""Freezing at epochs that the user names."""

from __future__ import annotations

from typing import Any

from .base import FreezePolicy, Moment
from .schedule import format_freeze_points, next_change, parse_freeze_points, scheduled_changes, scheduled_cut


class ManualPolicy(FreezePolicy):
    """Freezes at the epochs, or fractions of the training, that the user names.

    Args:
        freeze_points: e.g. `"1:4,3:8"`, see `parse_freeze_points`; or a list of pairs, see `format_freeze_points`.

    Raises:
        TypeError: if they are neither text nor pairs.
        ValueError: if the text is not understood, or every cut is 0.
    """

    name = "manual"

    def __init__(self, freeze_points: Any):
        self.text = format_freeze_points(freeze_points)
        self.points = parse_freeze_points(self.text)
        if all(point.cut == 0 for point in self.points):
            raise ValueError(
                f"freeze_points={self.text!r} freezes nothing: a cut is a number of frozen blocks, from 1. To train "
                "everything, set policy='none'."
            )

    def describe(self) -> str:
        return f"manual, freeze_points={self.text!r}"

    def changes(self, num_blocks: int, num_epochs: int) -> list[tuple[int, int]]:
        return scheduled_changes(self.points, num_epochs)

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
