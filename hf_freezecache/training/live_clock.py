"""How fast live epochs run: what a training shows by itself, for decisions that should cost less than they save."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Lap:
    """One live epoch, or what of it a resumed training has run.

    Args:
        cut: frozen blocks.
        seconds: of all of it, evaluations and builds apart.
        waits: seconds in which the training waited for each of its batches.
    """

    cut: int
    seconds: float
    waits: tuple[float, ...]

    @property
    def step(self) -> float:
        """Seconds of a batch, waiting for it included."""
        return self.seconds / len(self.waits)

    def load(self, workers: int) -> float:
        """Seconds of waiting for a batch; where loader processes have to start, for one that is not the first."""
        return fmean(self.waits[1:] if workers and len(self.waits) > 1 else self.waits)

    def start(self, workers: int) -> float:
        """Seconds that loader processes take to start; 0 without them."""
        return max(0.0, self.waits[0] - self.load(workers)) if workers else 0.0


class LiveClock:
    """Notes the last live epoch.

    Attributes:
        last: the last one that has ended; None if none has.
    """

    def __init__(self) -> None:
        self.last: Lap | None = None
        self._since: float | None = None
        self._waits: list[float] = []

    def begin(self, seconds: float) -> None:
        """An epoch begins.

        Args:
            seconds: that its phase has taken so far.
        """
        self._since, self._waits = seconds, []

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; notes how long the training waits for each."""
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waits.append(time.perf_counter() - start)
            yield batch

    def end(self, cut: int, seconds: float) -> None:
        """A live epoch has ended.

        Args:
            cut: frozen blocks.
            seconds: that its phase has taken so far.
        """
        if self._since is not None and self._waits:
            self.last = Lap(cut, seconds - self._since, tuple(self._waits))
        self._since = None

    def give_up(self) -> None:
        """The epoch has changed its source and tells nothing."""
        self._since = None
