"""Draws: the samples for which a replayable transform draws, in a live epoch or as views for the cache.

A data set passes images to its transform, not sample numbers. Code that fetches rows sets a `Draw` for the length of a
context. The transform reads from it what its random numbers depend on, and writes the geometry of its views to it.
Code that wants to know which functions of rows a data set calls, and with which rows, watches the calls.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

_current: ContextVar[Draw | None] = ContextVar("freezecache_draw", default=None)
_calls: ContextVar[list[RowCall] | None] = ContextVar("freezecache_calls", default=None)


class Draw:
    """The samples of one fetch, and what their random numbers depend on.

    Args:
        seed: of the training.
        samples: row numbers, in the order in which they are fetched.
        epoch: the live epoch; None for the cache.
        view: number of the view for the cache, 0 for the base view, or one number per sample; None in live epochs.
        geometry: kind and feature grid `(h, w)` of the geometry that is requested; None: no geometry is.
        occurrences: how often each sample was drawn in the live epoch before; None: never.
        together: whether a function of rows gets all rows of a call at once in a live epoch, as from `with_transform`,
            with random numbers from the global generators: it combines rows.

    Attributes:
        geometries: geometry of the views that are not the base view, `(G,)` each, written by the transform.
        refused: why a transform could not give the geometry; None if it could.
        position: number of samples that the transform has drawn so far.

    Raises:
        ValueError: if the number of views, or of occurrences, is not the number of samples.
    """

    def __init__(
        self,
        seed: int,
        samples: Sequence[int],
        epoch: int | None = None,
        view: int | Sequence[int] | None = None,
        geometry: tuple[str, tuple[int, int]] | None = None,
        occurrences: Sequence[int] | None = None,
        together: bool = False,
    ):
        if not (view is None or isinstance(view, int)) and len(view) != len(samples):
            raise ValueError(f"got {len(view)} views for {len(samples)} samples: one each, or one number for all.")
        if occurrences is not None and len(occurrences) != len(samples):
            raise ValueError(f"got {len(occurrences)} occurrences for {len(samples)} samples: one each.")
        self.seed, self.samples, self.epoch, self.geometry = seed, samples, epoch, geometry
        self._view, self._occurrences = view, occurrences
        self.together = together and view is None
        self.geometries: list[torch.Tensor] = []
        self.refused: str | None = None
        self.position = 0

    @property
    def view(self) -> int | None:
        """View of the sample that `take` returned last; None in live epochs."""
        if self._view is None or isinstance(self._view, int):
            return self._view
        return self._view[max(self.position - 1, 0)]

    def take(self) -> int:
        """Counts one more image and returns the number of its sample.

        Raises:
            ValueError: if the transform is called for more images than samples are fetched.
        """
        if self.position == len(self.samples):
            raise ValueError(
                f"the transform was called for more images than the {len(self.samples)} samples fetched: which image "
                "belongs to which sample is unknown. Use one `ReplayableTransform`, once per row."
            )
        self.position += 1
        return self.samples[self.position - 1]

    def key(self, sample: int) -> tuple[int | str, ...]:
        """Everything on which the random numbers of the sample that `take` returned last depend.

        Raises:
            ValueError: if the draw has neither an epoch nor a view.
        """
        view = self.view
        if view is not None:
            return ("view", self.seed, sample, view)
        if self.epoch is None:
            raise ValueError("a draw needs the epoch, in live epochs, or the view, for the cache.")
        again = 0 if self._occurrences is None else self._occurrences[max(self.position - 1, 0)]
        return ("live", self.seed, self.epoch, sample, *([again] if again else []))


@contextlib.contextmanager
def use_draw(draw: Draw) -> Iterator[Draw]:
    """Inside the context, replayable transforms draw for these samples.

    Raises:
        ValueError: on leaving the context, if a transform was called for some of the samples, but not for all.
    """
    token = _current.set(draw)
    try:
        yield draw
    finally:
        _current.reset(token)
    if draw.position not in (0, len(draw.samples)):
        raise ValueError(
            f"the transform was called for {draw.position} of {len(draw.samples)} samples fetched: which image "
            "belongs to which sample is unknown. A data set that keeps transformed images cannot be replayed."
        )


def current_draw() -> Draw | None:
    """The draw of the fetch that is running; None if rows are read outside `use_draw`."""
    return _current.get()


@dataclass(frozen=True)
class RowCall:
    """One call of a transform that consists of functions of rows.

    Args:
        functions: the functions by name, `train` and `base`.
        column: of the images.
        rows: column name -> values that the call got.
    """

    functions: Mapping[str, Callable]
    column: str
    rows: Mapping[str, Sequence[Any]]


@contextlib.contextmanager
def watch_calls() -> Iterator[list[RowCall]]:
    """Inside the context, the calls of functions of rows are added to the list."""
    calls: list[RowCall] = []
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)


def note_call(functions: Mapping[str, Callable], column: str, rows: Mapping[str, Sequence[Any]]) -> None:
    """Adds a call to the list of `watch_calls`, with copies of its rows; does nothing outside it. See `RowCall`."""
    calls = _calls.get()
    if calls is not None:
        calls.append(RowCall(functions, column, copy.deepcopy(dict(rows))))
