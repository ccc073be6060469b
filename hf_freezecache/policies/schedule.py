"""Schedules: cuts that are fixed before the training, at epochs or fractions of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_POINT = re.compile(r"^\s*(?P<when>\d+|\d*\.\d+|\d+\.\d*)\s*:\s*(?P<cut>\d+)\s*$")


@dataclass(frozen=True)
class FreezePoint:
    """A cut and the point of the training at which it takes effect.

    Args:
        when: an epoch, from 0 (int), or a fraction of the training (float).
        cut: number of frozen blocks.
    """

    when: int | float
    cut: int

    def epoch(self, num_epochs: int) -> int:
        """The epoch at whose beginning the cut takes effect; a fraction of the training is rounded up to an epoch."""
        if isinstance(self.when, int):
            return self.when
        # 0.1 * 30 is 3.0000000000000004: without the subtraction it would be rounded up to epoch 4.
        return math.ceil(self.when * num_epochs - 1e-9)


def format_freeze_points(points: Any) -> str:
    """The points of a schedule as text.

    Args:
        points: text already; or `when:cut` texts or `(when, cut)` pairs in a list; or cuts by epoch in a dict.

    Raises:
        TypeError: if it is none of these.
    """
    if isinstance(points, str):
        return points
    if isinstance(points, Mapping):
        points = list(points.items())
    if isinstance(points, (list, tuple)) and points:
        parts = [f"{point[0]}:{point[1]}" if _is_pair(point) else point for point in points]
        if all(isinstance(part, str) for part in parts):
            return ",".join(parts)
    raise TypeError(
        f"freeze_points={points!r}: write epoch:cut pairs as text, '1:4,3:8', or as a list, [(1, 4), (3, 8)]."
    )


def _is_pair(point: Any) -> bool:
    return isinstance(point, (list, tuple)) and len(point) == 2


def parse_freeze_points(text: str) -> list[FreezePoint]:
    """Reads the points of a schedule.

    Args:
        text: `when:cut` pairs separated by commas. An integer is an epoch (`"1:4,3:8"`), a number with a decimal point
            a fraction of the training (`"0.25:8"`).

    Raises:
        ValueError: on a syntax error, a fraction above 1, points out of order or cuts that decrease.
    """
    points = []
    for part in text.split(","):
        match = _POINT.match(part)
        if match is None:
            raise ValueError(
                f"freeze point {part.strip()!r} in {text!r} is not understood: write epoch:cut pairs separated by "
                "commas, e.g. '1:4,3:8', or fractions of training with a point, e.g. '0.25:8'."
            )
        when = float(match["when"]) if "." in match["when"] else int(match["when"])
        if isinstance(when, float) and when > 1.0:
            raise ValueError(f"freeze point {part.strip()!r}: {when} is a fraction of training, at most 1.0.")
        points.append(FreezePoint(when, int(match["cut"])))
    for earlier, later in zip(points, points[1:], strict=False):
        if type(earlier.when) is type(later.when) and later.when <= earlier.when:
            raise ValueError(f"freeze points {text!r} are out of order: {later.when} follows {earlier.when}.")
        if later.cut < earlier.cut:
            raise ValueError(
                f"freeze points {text!r}: cut {later.cut} follows cut {earlier.cut}; cuts never decrease."
            )
    return points


def scheduled_changes(points: Sequence[FreezePoint], num_epochs: int) -> list[tuple[int, int]]:
    """The epochs in which the cut changes, with the cut from then on; those beyond the training too.

    Args:
        points: of the schedule.
        num_epochs: epochs of the whole training.
    """
    changes: list[tuple[int, int]] = []
    for epoch, cut in sorted((point.epoch(num_epochs), point.cut) for point in points):
        deepest = changes[-1][1] if changes else 0
        if cut > deepest:
            if changes and changes[-1][0] == epoch:
                changes.pop()
            changes.append((epoch, cut))
    return changes


def scheduled_cut(points: list[FreezePoint], epoch: int, num_epochs: int) -> int:
    """The deepest cut among the points up to and including `epoch`; 0 if there are none."""
    return max((point.cut for point in points if point.epoch(num_epochs) <= epoch), default=0)


def next_change(points: list[FreezePoint], epoch: int, num_epochs: int, cut: int) -> int | None:
    """The first epoch after `epoch` with a point deeper than `cut`; None if there is none within the training."""
    epochs = [point.epoch(num_epochs) for point in points if point.cut > cut]
    return min((later for later in epochs if epoch < later < num_epochs), default=None)
