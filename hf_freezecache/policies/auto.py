"""A schedule that a short trial chooses before the training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import FreezePolicy, Moment
from .schedule import (
    FreezePoint,
    format_freeze_points,
    next_change,
    parse_freeze_points,
    scheduled_changes,
    scheduled_cut,
)
from .trial import Choice, Trial

#: Share of the deepest cut that is frozen from the start where the trial allows it.
_AT_ONCE = 2 / 3


class AutoPolicy(FreezePolicy):
    """Freezes from the start where a trial shows that nothing is lost by it; else late, once, and deep.

    Before the first step, a few optimizer steps are taken twice from the same weights, with `max_frozen` of the blocks
    frozen and with all live, and taken back. If the loss on held-out training samples is smaller with frozen blocks,
    by more than its standard error, features of the pretrained model suit the data better than what a few steps make
    of them, and two thirds of these blocks are frozen from the start. Else, and where the training is too short for a
    trial, the early blocks have to adapt first: all of these blocks are frozen at the fraction `end` of the training.
    So they are where a training is resumed from a checkpoint of another rule: the moment for a trial is over.
    Ours; measured in `benchmarks/headline`.

    Args:
        max_frozen: fraction of the blocks in the deepest cut.
        end: fraction of the training at which that is frozen where it cannot be from the start.
    """

    name = "auto"

    def __init__(self, max_frozen: float = 0.75, end: float = 0.5):
        self.max_frozen, self.end = max_frozen, end
        self._points: list[FreezePoint] | None = None
        self.why, self._numbers = "", dict[str, float | None]()

    def describe(self) -> str:
        return f"auto, max_frozen={self.max_frozen}, freeze_end={self.end}"

    def start(self, num_blocks: int) -> None:
        self._points, self.why, self._numbers = None, "", {}

    def trial_cut(self, num_blocks: int) -> int:
        return round(self.max_frozen * num_blocks)

    def take_trial(self, trial: Trial | None, num_blocks: int) -> str:
        self._numbers = {} if trial is None else trial.numbers()
        if trial is not None and trial.difference < -trial.error:
            self._points = [FreezePoint(0, round(self.max_frozen * num_blocks * _AT_ONCE))]
            verdict = "features of the model as it is suit these samples, so that blocks are frozen from the start"
        else:
            self._points = self._late(num_blocks)
            verdict = "early blocks adapt first, and are frozen late"
        found = "the training is too short for a trial" if trial is None else trial.describe()
        self.why = f"{found[0].upper()}{found[1:]}: {verdict}."
        return self.why

    def skip_trial(self, num_blocks: int) -> str | None:
        if self._points is not None:
            return None
        self._points = self._late(num_blocks)
        self.why = (
            "Policy auto decides by a trial before the first step, which the checkpoint's training did not have; "
            f"without one, {self.trial_cut(num_blocks)} of {num_blocks} blocks are frozen at the fraction {self.end} "
            "of the training, and what is frozen already stays frozen."
        )
        return self.why

    def choice(self) -> Choice | None:
        if self._points is None:
            return None
        return Choice(self.name, self._format_points(), self.why, self._numbers)

    def changes(self, num_blocks: int, num_epochs: int) -> list[tuple[int, int]] | None:
        return None if self._points is None else scheduled_changes(self._points, num_epochs)

    def decide(self, moment: Moment) -> int:
        return scheduled_cut(self._chosen, moment.epoch, moment.num_epochs)

    def next_change(self, moment: Moment) -> int | None:
        return next_change(self._chosen, moment.epoch, moment.num_epochs, moment.cut)

    def _late(self, num_blocks: int) -> list[FreezePoint]:
        return [FreezePoint(float(self.end), self.trial_cut(num_blocks))]

    def _format_points(self) -> str:
        return format_freeze_points([(point.when, point.cut) for point in self._chosen])

    @property
    def _chosen(self) -> list[FreezePoint]:
        if self._points is None:
            raise RuntimeError("policy 'auto' decides after its trial: call `take_trial` or `skip_trial` before.")
        return self._points

    def state_dict(self) -> dict[str, Any]:
        points = None if self._points is None else self._format_points()
        return {"points": points, "why": self.why, "numbers": self._numbers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("points") is None or "why" not in state:  # of another rule
            return
        self._points, self.why = parse_freeze_points(state["points"]), state["why"]
        self._numbers = state.get("numbers", {})  # checkpoints of earlier versions have none
