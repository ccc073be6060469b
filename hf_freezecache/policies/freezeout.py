"""FreezeOut: one block after the other, in the order of their depth."""

from __future__ import annotations

from .base import FreezePolicy, Moment
from .schedule import FreezePoint, next_change, scheduled_changes, scheduled_cut


class FreezeOutPolicy(FreezePolicy):
    """Freezes block i of L at the fraction `start + (1 - start) * i / L` of the training, the stem first.

    Brock et al. 2017, arXiv 1706.04983. The paper lets the learning rate of each block fall to 0 until then, and
    divides it by that fraction: `anneal="cosine", anneal_scale=True` do that; without them blocks freeze at full rate,
    which was better in all tasks of `benchmarks/policies`: by 2 points in fine-tunings, by 7 from scratch.
    The head is the last layer, which would freeze at the end of the training.

    As implemented: a fraction is rounded up to an epoch, and no more than `max_frozen` of the blocks freeze (1.0 in
    the paper). A deeper cut in every epoch is a build in every epoch, if stores are wanted at all: this rule saves by
    freezing, hardly by stores.

    Args:
        start: fraction of the training at which the stem freezes (t_0 of the paper).
        cubed: cube the fractions: early blocks freeze earlier still.
        max_frozen: fraction of the blocks in the deepest cut.
    """

    name = "freezeout"

    def __init__(self, start: float = 0.25, cubed: bool = False, max_frozen: float = 0.75):
        self.begin, self.cubed, self.max_frozen = start, cubed, max_frozen

    def points(self, num_blocks: int) -> list[FreezePoint]:
        """The schedule for a chain of `num_blocks` blocks."""
        fractions = [self.begin + (1 - self.begin) * block / num_blocks for block in range(num_blocks)]
        deepest = round(self.max_frozen * num_blocks)
        return [
            FreezePoint(float(fraction**3 if self.cubed else fraction), block + 1)
            for block, fraction in enumerate(fractions[:deepest])
        ]

    def describe(self) -> str:
        return f"freezeout, freeze_start={self.begin}, cubed={self.cubed}, max_frozen={self.max_frozen}"

    def changes(self, num_blocks: int, num_epochs: int) -> list[tuple[int, int]]:
        return scheduled_changes(self.points(num_blocks), num_epochs)

    def decide(self, moment: Moment) -> int:
        return scheduled_cut(self.points(moment.num_blocks), moment.epoch, moment.num_epochs)

    def next_change(self, moment: Moment) -> int | None:
        return next_change(self.points(moment.num_blocks), moment.epoch, moment.num_epochs, moment.cut)
