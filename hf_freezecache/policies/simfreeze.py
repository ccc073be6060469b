"""SimFreeze: blocks that have stopped to move away from where they began."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .base import Moment, ObservedBlock
from .cka import cka
from .settling import SettlingPolicy, tensor_from_text, tensor_to_text


class SimFreezePolicy(SettlingPolicy):
    """Freezes a block when the CKA of its output with that of the first model stands still.

    SimFreeze, of ETuner (Li et al. 2024, arXiv 2401.16694). The output of every block for a few fixed training samples
    is compared with what it was before the first step, by linear CKA; a block has settled when that has changed by
    less than `tolerance` of itself in each of the last `window` readings.

    As implemented: readings are as often as costs little, `similarities` of `ObservedBlock`, so that `tolerance` is
    one from reading to reading. The output of a block moves with the blocks before it. A rule of small steps cannot
    tell a block that has settled from one that has not begun: a small learning rate, a warm-up, or close readings
    freeze too early. Measured (`benchmarks/policies`): it froze late, saved 3 to 13 % of the FLOPs, and was 0.1 to 1.4
    points below no freezing.

    Args:
        tolerance: largest change from one reading to the next, relative to the value.
        window: readings that must all be within it.
        max_frozen: fraction of the blocks in the deepest cut.
    """

    name = "simfreeze"
    observes = frozenset({"similarities"})

    def __init__(self, tolerance: float = 0.01, window: int = 3, max_frozen: float = 1.0):
        super().__init__(max_frozen)
        if not tolerance > 0 or window < 1:
            raise ValueError(f"tolerance={tolerance!r} must be more than 0, and window={window!r} at least 1.")
        self.tolerance, self.window = tolerance, window
        self._first: dict[int, torch.Tensor] = {}
        self._values: dict[int, list[float]] = {}

    def start(self, num_blocks: int) -> None:
        super().start(num_blocks)
        self._first, self._values = {}, {}

    def look(self, moment: Moment, blocks: Sequence[ObservedBlock]) -> None:
        read = {block.index: block.similarities for block in blocks if block.similarities is not None}
        if not read:
            return
        if not self._first:
            self._first = read
        for index, now in read.items():
            values = self._values.setdefault(index, [])
            values.append(cka(self._first[index], now))
            del values[: -self.window - 1]
        self.settle([self._is_settled(index) for index in sorted(read) if index >= self.settled])

    def _is_settled(self, index: int) -> bool:
        values = self._values[index]
        changes = [abs(now - before) for before, now in zip(values, values[1:], strict=False)]
        return len(changes) == self.window and all(change < self.tolerance * values[-1] for change in changes)

    def describe(self) -> str:
        return f"simfreeze, tolerance={self.tolerance}, window={self.window}, max_frozen={self.max_frozen}"

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "first": {str(index): tensor_to_text(value) for index, value in self._first.items()},
            "values": {str(index): list(values) for index, values in self._values.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._first = {int(index): tensor_from_text(text) for index, text in state.get("first", {}).items()}
        self._values = {int(index): list(values) for index, values in state.get("values", {}).items()}
