"""For what a replayable transform draws: a sample in a live epoch, or a view of a sample for the cache.

A data set hands its transform images, not sample numbers. Whoever fetches rows says in a context which samples they
are; the transform takes its random numbers from there, and leaves the geometry of what it drew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch

_current: ContextVar[Draw | None] = ContextVar("freezecache_draw", default=None)


class Draw:
    """What the rows that are being fetched are for.

    Args:
        seed: of the training.
        samples: row numbers, in the order in which they are fetched.
        epoch: of a live epoch; None for the cache.
        view: number of the view for the cache, 0 being the base, or one number per sample; None in live epochs.
        geometry: kind and feature grid `(h, w)` in which the views' geometry is wanted; None if it is not.

    Attributes:
        geometries: what the transform has left, one row per sample taken whose view is not the base view.
        refused: why a transform could not tell the geometry; None if it could.
    """

    def __init__(
        self,
        seed: int,
        samples: Sequence[int],
        epoch: int | None = None,
        view: int | Sequence[int] | None = None,
        geometry: tuple[str, tuple[int, int]] | None = None,
    ):
        if not (view is None or isinstance(view, int)) and len(view) != len(samples):
            raise ValueError(f"got {len(view)} views for {len(samples)} samples: one each, or one number for all.")
        self.seed, self.samples, self.epoch, self.geometry = seed, samples, epoch, geometry
        self._view = view
        self.geometries: list[torch.Tensor] = []
        self.refused: str | None = None
        self.taken = 0

    @property
    def view(self) -> int | None:
        """View of the sample that was taken last; None in live epochs."""
        if self._view is None or isinstance(self._view, int):
            return self._view
        return self._view[max(self.taken - 1, 0)]

    def take(self) -> int:
        """Number of the sample whose image comes next.

        Raises:
            ValueError: if the transform is called for more images than samples are fetched.
        """
        if self.taken == len(self.samples):
            raise ValueError(
                f"the transform was called for more images than the {len(self.samples)} samples fetched: which image "
                "belongs to which sample is unknown. Use one `ReplayableTransform`, once per row."
            )
        self.taken += 1
        return self.samples[self.taken - 1]

    def key(self, sample: int) -> tuple[int | str, ...]:
        """What the random numbers of the sample that was taken last depend on, and nothing else."""
        view = self.view
        if view is None:
            return ("live", self.seed, self.epoch, sample)
        return ("view", self.seed, sample, view)


@contextlib.contextmanager
def use_draw(draw: Draw) -> Iterator[Draw]:
    """Inside, replayable transforms draw for these samples.

    Raises:
        ValueError: on leaving, if a transform was called for some of the samples, but not for all.
    """
    token = _current.set(draw)
    try:
        yield draw
    finally:
        _current.reset(token)
    if draw.taken not in (0, len(draw.samples)):
        raise ValueError(
            f"the transform was called for {draw.taken} of {len(draw.samples)} samples fetched: which image "
            "belongs to which sample is unknown. A data set that keeps transformed images cannot be replayed."
        )


def current_draw() -> Draw | None:
    """What is being fetched; None where a data set is read by somebody else."""
    return _current.get()
