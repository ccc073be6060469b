"""Freezing nothing."""

from __future__ import annotations

from .base import FreezePolicy, Moment


class NonePolicy(FreezePolicy):
    """Never freezes: the trainer is `transformers.Trainer`."""

    name = "none"

    def changes(self, num_blocks: int, num_epochs: int) -> list[tuple[int, int]]:
        return []

    def decide(self, moment: Moment) -> int:
        return 0
