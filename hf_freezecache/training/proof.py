"""Proof where it counts: before the first replay of a cut, at every replay epoch, and at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from transformers.utils import logging

from ..build.context import BuildContext
from ..build.survey import Augmentation
from ..cache.store import FeatureStore
from ..distributed import Announcer, describe_error
from ..model.errors import ChainError
from ..rng import preserve_rng
from .rehearsal import Rehearsal, RehearsalError
from .sentinels import check_sentinels
from .watch import FrozenWatch

logger = logging.get_logger(__name__)


class MismatchError(RuntimeError):
    """Features are not those of the training (any more), and it cannot, or must not, go on from samples."""


class Proof:
    """Answers why features cannot be used, as sentences; None if they can. All processes answer the same.

    Args:
        context: the training.
        rehearsal: of the trainer's own step.
        whole: makes a context in which every process has all weights.
    """

    def __init__(self, context: BuildContext, rehearsal: Rehearsal, whole: Callable[[], AbstractContextManager[Any]]):
        self.context, self.rehearsal, self._whole = context, rehearsal, whole
        self._rehearsed: set[int] = set()
        self._watch: FrozenWatch | None = None

    def rehearse(self, cuts: Sequence[int]) -> str | None:
        """Before the training, while nothing is frozen: the trainer's step on features of these cuts."""
        chain = self.context.chain
        for cut in cuts:
            try:
                chain.freeze(cut)
                why = self._rehearse(cut)
            finally:
                chain.unfreeze()
            if why is not None:
                return why
        return None

    def of_prefix(self, cut: int) -> str | None:
        """At an epoch's beginning: the trainer's step was rehearsed, and the frozen prefix is what it was."""
        if cut not in self._rehearsed:
            why = self._rehearse(cut)
            if why is not None:
                return why
        if self._watch is None or self._watch.cut != cut:
            self._watch = FrozenWatch(self.context.chain)
            return None
        return self._first(_sentence(self._watch.at_epoch()))

    def of_rows(self, store: FeatureStore, augmentation: Augmentation, epoch: int) -> str | None:
        """At a replay epoch's beginning: a few rows of the store are what samples and prefix give now."""
        try:
            found = check_sentinels(self.context, store, augmentation, epoch)
            why = None if found is None else f"{found}. Probably {found.likely_cause} has changed."
        except Exception as error:  # the user's own code, the model's, or a store that is gone
            Announcer.trace(logger, "The rows of a store could not be compared", error)
            why = f"its rows could not be compared with what they are now: {describe_error(error)}"
        return self._first(why)

    def at_step(self) -> str | None:
        """Before a step, on this process alone: what costs nothing to see of the frozen prefix."""
        return None if self._watch is None else _sentence(self._watch.at_step())

    def _rehearse(self, cut: int) -> str | None:
        try:
            with self._whole(), preserve_rng():
                self.rehearsal.check(cut)
        except (RehearsalError, ChainError) as error:
            return str(error)
        self._rehearsed.add(cut)
        return None

    def _first(self, why: str | None) -> str | None:
        return next((reason for reason in self.context.group.gather(why) if reason is not None), None)


def _sentence(changed: str | None) -> str | None:
    return None if changed is None else f"{changed} while it is frozen."
