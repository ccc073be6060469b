"""Where the batches of the epoch that begins come from: the one place that decides it."""

from __future__ import annotations

import enum
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from transformers.utils import logging

from ..build.errors import BuildFailed, GeometryMisfit, NotWritable
from ..build.partial import PartialStore
from ..build.spec_maker import WRITTEN
from ..cache.cleaning import has_stores
from ..cache.directories import check_writable
from ..cache.names import partial_path
from ..cache.rows import RowError
from ..cache.store import FeatureStore
from ..distributed import Announcer, describe_error
from ..model.errors import ChainError
from .accounting import Accounts
from .epoch_source import EpochSource, FromImages, FromStore, Problem, Writing
from .store_provider import Decision, Request, StoreProvider
from .worth import Declined

logger = logging.get_logger(__name__)

T = TypeVar("T")
_CONSEQUENCE = "The blocks stay frozen, but every epoch reads samples and runs them through the frozen blocks"


class Step(enum.Enum):
    """How the next epoch's source follows from the last one's."""

    STAY = "the source stays what it is"
    IMAGES = "no store is made at this cut"
    BUILD = "open the store of the cut, or build it"
    BEGIN = "begin to write the store"
    OPEN = "open the directory that epochs of the interrupted training have written to"
    RESTORE = "open the store that epochs have written, or complete it again"
    WRITE = "write another epoch"
    FINISH = "complete the store that epochs have written"
    GIVE_UP = "stop writing: an epoch could not be written"


def choose_step(
    previous: EpochSource,
    cut: int,
    epoch: int,
    decision: Decision | None = None,
    problems: Sequence[Problem] = (),
    writes_through: bool = False,
) -> Step:
    """The transition from one epoch's source to the next one's.

    Args:
        previous: source of the epoch before; a checkpoint's after a resume.
        cut: frozen blocks of the epoch that begins.
        epoch: its number.
        decision: the choice made at this cut before.
        problems: why epochs before this one could not be written, of all processes.
        writes_through: whether live epochs write stores (`materialize="write_through"`).
    """
    if cut == 0:
        return Step.IMAGES
    if previous.cut == cut:
        if isinstance(previous, FromImages) and previous.lasts(epoch):
            return Step.STAY
        if isinstance(previous, FromStore) and previous.is_open:
            return Step.STAY
        if isinstance(previous, Writing):
            if problems:
                return Step.GIVE_UP
            if previous.store is None:
                return Step.OPEN
            return Step.WRITE if epoch - previous.start < previous.rounds() else Step.FINISH
    if not writes_through or (decision is not None and not decision.written):
        return Step.BUILD
    if decision is not None and decision.store is not None:
        return Step.RESTORE
    return Step.BEGIN


class StoreKeeper:
    """Decides where the batches of each epoch come from, and has the stores made for it.

    Args:
        provider: finds and makes stores.
        accounts: of the training.
        explicit: whether the user gave the settings; the defaults never cost a training.
        why_not: why nothing can be cached in this training; None if it can.
    """

    def __init__(self, provider: StoreProvider, accounts: Accounts, explicit: bool, why_not: str | None = None):
        self.provider, self.accounts, self.explicit, self.why_not = provider, accounts, explicit, why_not
        self.group, config = provider.group, provider.config
        self.announcer = Announcer(self.group, logger)
        self._writes_through = config.materialize == "write_through"
        # Cut of the checkpoint that the training was resumed from; None: it was not.
        self._resumed_cut: int | None = None
        # Whether stores could be written when the training began: what the disk does later costs no training.
        self._could_write = False
        # Why features cannot be used any more, found in the course of this training; None if they can.
        self.mismatch: str | None = None

    @property
    def why_not_cached(self) -> str | None:
        """Why nothing is cached (any more) in this training; None if it is."""
        return self.why_not if self.mismatch is None else self.mismatch

    def check_directory(self, is_planned: bool) -> None:
        """Before the first step of a training that may make stores: looks whether it can write them.

        Args:
            is_planned: whether it is known that blocks will be frozen.

        Raises:
            NotWritable: under explicit settings with `cache="always"`, if it cannot and there are none to be used.
        """

        def check() -> bool:
            try:
                check_writable(self.provider.cache_dir)
            except OSError as error:
                must_write = is_planned and self.explicit and self.provider.config.cache == "always"
                if must_write and not has_stores(self.provider.cache_dir):
                    raise NotWritable(str(error)) from error
                return False
            return True

        disks = self.provider.disks
        self._could_write = disks.all(disks.on_all(lambda: disks.on_main(check)))

    def next(self, cut: int, epochs_left: float, previous: EpochSource, epoch: int) -> EpochSource:
        """The source of the epoch that begins.

        Stores of earlier cuts are deleted, if this training has built them: as soon as the new one is complete, or
        before where the budget does not hold both.

        Args:
            cut: frozen blocks.
            epochs_left: epochs of training that remain at this cut, the one that begins included.
            previous: source of the epoch before; a checkpoint's after a resume.
            epoch: number of the epoch that begins.

        Raises:
            ValueError: under explicit settings, if the features cannot be stored (not finite, of several sizes).
        """
        if self.why_not_cached is not None:
            if isinstance(previous, Writing):
                self._discard(previous)
            return FromImages(cut, self.why_not_cached)
        if isinstance(previous, Writing) and previous.cut != cut:
            self._give_up_incomplete(previous)
            previous = FromImages()
        problems = self._problems(previous, epoch)
        decision = self.provider.decisions.get(cut)
        step = choose_step(previous, cut, epoch, decision, problems, self._writes_through)
        if step is Step.STAY:
            return previous
        if step is Step.IMAGES:
            return FromImages(cut)
        with self.accounts.building(cut) as phase:
            pace = self.accounts.pace(cut, self.provider.source.num_workers)
            request = Request(cut, epochs_left, phase, _parent(previous), pace, is_first=epoch == 0)
            source = self._take(step, request, previous, epoch, problems)
            if not isinstance(source, Writing):
                self.provider.remove_outdated(cut, source.store.path if isinstance(source, FromStore) else None)
        if isinstance(source, FromImages):
            self.accounts.decline(phase)
        return source

    def without_measuring(self, cut: int, epochs_left: float, previous: EpochSource) -> EpochSource:
        """The source of the epoch that begins, where it is clear that no store pays at its cut; else the one before.

        Nothing is measured, rehearsed or proved for it.

        Args:
            cut: frozen blocks.
            epochs_left: epochs of training that remain at this cut, the one that begins included.
            previous: source of the epoch before; a checkpoint's after a resume.
        """
        if not cut or previous.cut == cut or self.why_not_cached is not None:
            return previous
        pace = self.accounts.pace(cut, self.provider.source.num_workers)
        why = self.provider.why_hopeless(cut, epochs_left, pace)
        if why is None:
            return previous
        if isinstance(previous, Writing):
            self._give_up_incomplete(previous)
        self._announce_none(cut, why)
        self.provider.remove_outdated(cut)
        return FromImages(cut, why)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training must know, as JSON values."""
        return {**self.provider.state_dict(), "mismatch": self.mismatch}

    def load_state_dict(self, state: Mapping[str, Any], cut: int) -> None:
        """Continues from `state_dict()` and the cut of the checkpoint."""
        self._resumed_cut = cut
        self.mismatch = state.get("mismatch")
        self.provider.load_state_dict(state)

    def _take(
        self, step: Step, request: Request, previous: EpochSource, epoch: int, problems: Sequence[Problem]
    ) -> EpochSource:
        if step is not Step.GIVE_UP and step is not Step.WRITE and step is not Step.FINISH:
            self.provider.remove_outdated(request.cut, evaluations_only=True)
        if step is Step.BUILD:
            return self._build(request)
        if step is Step.BEGIN:
            return self._begin(request, epoch)
        if step is Step.RESTORE:
            return self._restore(request, epoch)
        assert isinstance(previous, Writing)
        if step is Step.GIVE_UP:
            return self._give_up(previous, max(problems, key=lambda problem: problem.is_misfit), request)
        if step is Step.OPEN:
            source = self._open(previous, request)
            if isinstance(source, FromImages):
                return source
            previous, step = source, choose_step(source, request.cut, epoch)
        if step is Step.WRITE:
            return Writing(request.cut, previous.opened, previous.start, epoch, previous.problem)
        return self._finish(previous.opened, request, epoch)

    # From a build

    def _build(self, request: Request) -> EpochSource:
        store = self._guarded(request.cut, lambda: self.provider.build(request))
        return store if isinstance(store, FromImages) else FromStore(request.cut, store)

    def _guarded(self, cut: int, make: Callable[[], T]) -> T | FromImages:
        """The store that `make` returns; samples, with a message, if it returns none.

        Nothing that a training can survive is raised: under explicit settings a build that could not be written, but
        for a directory that could not be written from the beginning on, and weights that have diverged since the cut
        was proved at the beginning; under the defaults any error.
        """
        survivable = (BuildFailed, ChainError) if self.explicit else Exception
        try:
            return make()
        except (Declined, RowError) as reason:
            why = str(reason).rstrip(".")
            self._announce_none(cut, why)
        except survivable as error:
            if self.explicit and isinstance(error, NotWritable) and not self._could_write:
                raise
            why = describe_error(error)
            self.announcer.failure(f"The feature store of cut {cut} could not be built. {_CONSEQUENCE}", error)
        return FromImages(cut, why)

    def _announce_none(self, cut: int, why: str) -> None:
        self.announcer.warning(f"No feature store for cut {cut}: {why}. {_CONSEQUENCE}.")

    # From live epochs

    def _begin(self, request: Request, epoch: int) -> EpochSource:
        store = self._guarded(request.cut, lambda: self.provider.begin(request))
        if isinstance(store, FromImages):
            return store
        if isinstance(store, PartialStore) or self._repeats_epochs(store, request):
            return Writing(request.cut, store, epoch, epoch)
        return FromStore(request.cut, store)

    def _repeats_epochs(self, store: FeatureStore, request: Request) -> bool:
        """Whether the training, resumed from before the freeze, now repeats the epochs that have written the store."""
        written = WRITTEN in store.manifest.made_from
        resumed = self._resumed_cut is not None and self._resumed_cut < request.cut
        return written and resumed and request.epochs_left >= store.manifest.views + 2

    def _restore(self, request: Request, epoch: int) -> EpochSource:
        """The store that a resumed training has replayed from already; computed again if it is gone."""
        store = self._guarded(request.cut, lambda: self.provider.begin(request, decided=True))
        return store if isinstance(store, FromImages) else self._finish(store, request, epoch)

    def _open(self, previous: Writing, request: Request) -> Writing | FromImages:
        store = self._guarded(request.cut, lambda: self.provider.begin(request, decided=True, accept_built=False))
        if isinstance(store, FromImages):
            self._discard(previous)
            return store
        return Writing(request.cut, store, previous.start, previous.epoch, previous.problem)

    def _finish(self, store: PartialStore | FeatureStore, request: Request, epoch: int) -> EpochSource:
        if isinstance(store, FeatureStore):
            return FromStore(request.cut, store)
        try:
            return FromStore(request.cut, self.provider.finish(store, request))
        except GeometryMisfit as misfit:
            problem = Problem(True, str(misfit), epoch)
        except Exception as error:  # the same on all processes, and nothing that a training needs
            Announcer.trace(logger, "A store that epochs have written could not be completed", error)
            problem = Problem(False, describe_error(error), epoch)
        return self._give_up(Writing(request.cut, store, epoch, epoch), problem, request)

    def _give_up(self, writing: Writing, problem: Problem, request: Request) -> EpochSource:
        self._discard(writing)
        if problem.is_misfit:
            self.announcer.warning(f"A build makes the feature store, not live epochs, because {problem.reason}.")
            decision = self.provider.decisions.get(request.cut)
            if decision is not None:
                self.provider.decisions[request.cut] = Decision(decision.codec)
            return self._build(request)
        self.announcer.warning(
            f"The feature store of cut {request.cut} could not be written. {_CONSEQUENCE}: {problem.reason}"
        )
        return FromImages(request.cut, problem.reason)

    def _problems(self, previous: EpochSource, epoch: int) -> list[Problem]:
        """Why the epochs before could not be written, on any process.

        A training that is resumed in the middle of an epoch goes on to its end, as the uninterrupted one did.
        """
        if not isinstance(previous, Writing):
            return []
        problems = self.group.gather(previous.problem)
        return [problem for problem in problems if problem is not None and problem.epoch < epoch]

    def _give_up_incomplete(self, writing: Writing) -> None:
        self.announcer.warning(
            f"The feature store of cut {writing.cut} was not complete before the next freeze: it is given up."
        )
        self._discard(writing)

    def _discard(self, writing: Writing) -> None:
        """Deletes a directory that epochs have written to, and forgets it."""
        if isinstance(writing.store, PartialStore):
            writing.store.remove()
            self.provider.holdings.drop(writing.store.path)
        elif writing.store is None and writing.name is not None:
            path = partial_path(self.provider.cache_dir / writing.name)  # resumed, and not opened since
            self.provider.holdings.drop(path)
            if self.group.is_main:
                shutil.rmtree(path, ignore_errors=True)


def _parent(previous: EpochSource) -> FeatureStore | int | None:
    """The store that a deeper one may be made from; its cut if it is not open."""
    if not isinstance(previous, FromStore):
        return None
    return previous.store if previous.is_open else previous.cut
