"""What is known of a store's gain before anything is measured: how fast the live epochs have run."""

from __future__ import annotations

from dataclasses import dataclass

from ..units import show_epochs, show_seconds
from .costs import Work, runs_of_prefix

#: Seconds that hardly any build stays below, however few samples there are: what identifies the store, proofs, files
#: that are made durable.
LEAST_BUILD_SECONDS = 0.1
#: Ranges that are loaded and run through the prefix to measure what a store costs and saves.
_MEASURED_RANGES = 6


@dataclass(frozen=True)
class Pace:
    """Seconds of one range in a live epoch at the cut before, as the training has shown them by itself.

    Args:
        step: from one batch to the next.
        load: of these, those in which the training waited for the batch.
        start: in which it waited for an epoch's first batch, where loader processes have to start; 0 without them.
        prefix_share: FLOPs of the blocks that a store would bypass, in the forward passes of a step, relative to those
            of the step.
    """

    step: float
    load: float
    start: float
    prefix_share: float

    @property
    def most_saved(self) -> float:
        """What a step from a store takes less, at most: nothing is read or decoded."""
        return self.load + (self.step - self.load) * self.prefix_share


def why_hopeless(
    work: Work, epochs_left: float, from_images: bool, pace: Pace | None = None, looks: float = 0.0
) -> str | None:
    """Why a store cannot pay, as far as nothing need be measured to see it.

    Args:
        work: of the build.
        epochs_left: epochs of training that remain.
        from_images: whether the build runs the prefix on samples, as a live epoch does.
        pace: of the live epochs; None if there were none.
        looks: ranges of samples that are yet to be drawn to see what is random in them.

    Returns:
        The reason, as the end of a sentence; None if it may pay.
    """
    if epochs_left < 1:
        return "less than one epoch remains"
    runs = runs_of_prefix(work) if from_images else 0.0
    if epochs_left * work.passes <= runs:
        saved = "as many runs" if work.passes == 1 else f"{work.passes} runs each"
        return (
            f"a build runs the frozen blocks over the data {runs:.3g} times, and the {show_epochs(epochs_left)} left "
            f"would save {saved} at most"
        )
    if pace is None:
        return None
    ranges = work.ranges / work.processes
    gain = pace.most_saved * (ranges * (epochs_left - runs / work.passes) - _MEASURED_RANGES)
    if gain > LEAST_BUILD_SECONDS + pace.start + looks * pace.load:
        return None
    return (
        f"the {show_epochs(epochs_left)} left take about {show_seconds(epochs_left * ranges * pace.step)}, of which a "
        f"store would save {show_seconds(epochs_left * ranges * pace.most_saved)} at most: less than it takes to "
        "measure that and to build one"
    )
