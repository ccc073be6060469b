"""AutoFreeze: blocks whose gradients have stopped to change."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .base import Moment, ObservedBlock
from .settling import SettlingPolicy


class AutoFreezePolicy(SettlingPolicy):
    """Freezes the front blocks whose gradients change least from one interval of the training to the next.

    Liu et al. 2021, arXiv 2102.01386. At the end of an interval, the change of a block is
    `|before - now| / before`, of its gradients' norms in this interval and the one before. The blocks from the input
    side freeze, up to the first whose change is not below the median of all live ones.

    As implemented: norms of the clipped gradients of each step are summed over an interval (the sum of gradients,
    whose norm the paper takes, would need their memory once more); norms that are not finite, of a step that fp16
    skips, do not count. The rule is relative, so that something below the median freezes whether or not anything has
    settled: the stem alone has even odds in every interval, in the first ones of a training from scratch as well.
    Measured (`benchmarks/policies`): fine-tunings kept their accuracy, at more FLOPs than with a schedule; a training
    from scratch lost 15 points.

    Args:
        intervals: in an epoch.
        max_frozen: fraction of the blocks in the deepest cut.
    """

    name = "autofreeze"
    observes = frozenset({"gradients"})

    def __init__(self, intervals: int = 2, max_frozen: float = 1.0):
        super().__init__(max_frozen)
        if isinstance(intervals, bool) or not isinstance(intervals, int) or intervals < 1:
            raise ValueError(f"intervals={intervals!r} of an epoch: 1, 2, ...")
        self.intervals = intervals
        self._before: dict[int, float] = {}
        self._sums: dict[int, torch.Tensor] = {}
        self._steps = 0

    def start(self, num_blocks: int) -> None:
        super().start(num_blocks)
        self._before, self._sums, self._steps = {}, {}, 0

    def look(self, moment: Moment, blocks: Sequence[ObservedBlock]) -> None:
        for block in blocks:
            gradients = [parameter.grad for parameter in block.parameters.values() if parameter.grad is not None]
            if gradients:
                # No value is looked at before the interval ends: that would wait for the accelerator.
                norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))).float()
                norm = torch.where(norm.isfinite(), norm, 0.0)
                known = self._sums.get(block.index)
                self._sums[block.index] = norm if known is None else known.to(norm.device) + norm
        self._steps += 1
        if self._steps >= math.ceil(moment.max_steps / moment.num_epochs / self.intervals):
            self._end_interval([block.index for block in blocks])

    def _end_interval(self, live: Sequence[int]) -> None:
        now = {index: float(self._sums[index]) if index in self._sums else 0.0 for index in live}
        if self._before:
            live = [index for index in live if index >= self.settled]
            changes = [_change(self._before.get(index, 0.0), now[index]) for index in live]
            if changes:
                limit = statistics.median(changes)
                self.settle([change < limit for change in changes])
        self._before, self._sums, self._steps = now, {}, 0

    def describe(self) -> str:
        return f"autofreeze, intervals={self.intervals}, max_frozen={self.max_frozen}"

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "before": {str(index): value for index, value in self._before.items()},
            "sums": {str(index): float(value) for index, value in self._sums.items()},
            "steps": self._steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._before = {int(index): value for index, value in state.get("before", {}).items()}
        self._sums = {int(index): torch.tensor(value) for index, value in state.get("sums", {}).items()}
        self._steps = state.get("steps", 0)


def _change(before: float, now: float) -> float:
    if not before:  # nothing of the block was trained, or nothing is any more
        return 0.0 if not now else math.inf
    return abs(before - now) / before
