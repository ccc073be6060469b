"""Freezing nothing."""

from __future__ import annotations

from .base import FreezePolicy, Moment


class NonePolicy(FreezePolicy):
    """Never freezes: the trainer is `transformers.Trainer`."""

    name = "none"

    def decide(self, moment: Moment) -> int:
        return 0
