"""What is asked of a `StoreProvider`, and what was decided at a cut before."""

from __future__ import annotations

from dataclasses import dataclass

from ..cache.store import FeatureStore
from ..estimate.pace import Pace
from .accounting import Phase


@dataclass(frozen=True)
class Decision:
    """The choice made at a cut. It is saved in the checkpoint so that a resumed training makes the same one.

    Args:
        codec: of the store.
        store: directory name of the store; None while live epochs write it.
        parent: cut of the store that it was made from; None if it was made from samples.
        written: whether live epochs have written it, or do.
    """

    codec: str
    store: str | None = None
    parent: int | None = None
    written: bool = False


@dataclass(frozen=True)
class Request:
    """What is asked of a `StoreProvider`.

    Args:
        cut: frozen blocks.
        epochs_left: epochs of training that remain at this cut.
        phase: books what is built.
        parent: the store that was replayed before, or its cut if it is not open; None if there was none.
        pace: of the live epochs before; None if there were none.
        is_first: whether no step was trained yet, so that other trainings have the same frozen blocks.
    """

    cut: int
    epochs_left: float
    phase: Phase
    parent: FeatureStore | int | None = None
    pace: Pace | None = None
    is_first: bool = False


@dataclass(frozen=True)
class Attempt:
    """A request and the way in which it is met.

    Args:
        request: what is asked.
        decision: the choice made at this cut before.
        writing: live epochs write the store, and only its directory is begun.
        decided: whether to write was decided before, so that nothing is measured.
        accept_built: while writing, a complete store that a build has made does as well.
    """

    request: Request
    decision: Decision | None
    writing: bool = False
    decided: bool = False
    accept_built: bool = True

    @property
    def is_open(self) -> bool:
        """Whether it is still to be decided if a store pays."""
        return self.decision is None and not self.decided
