"""Evaluations during training from cached features: they do not run the frozen prefix either."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
from torch.utils.data import DataLoader
from transformers.utils import logging

from ..build.errors import OverLimit
from ..build.materialize import materialize
from ..build.spec_maker import EVALUATION_CODEC, SpecMaker
from ..build.store_spec import StoreSpec
from ..build.survey import Augmentation, survey
from ..cache.holdings import Holdings, disk_limit, is_owned
from ..cache.rows import RowSource, check_dataset
from ..cache.store import FeatureStore, remove_store
from ..distributed import Announcer
from ..model.trace import Trace
from ..replay.collator import ReplayCollator
from ..replay.dataset import ReplayDataset
from ..replay.requests import SourceSwitch, find_switch
from ..rng import preserve_rng
from ..units import show_bytes
from .accounting import Accounts
from .combining import find_combined
from .data_state import looking_at
from .epoch_source import EpochSource, FromImages, FromStore, StepInputs, bypassing
from .store_provider import Declined
from .watch import checksums

logger = logging.get_logger(__name__)

#: Data sets that are remembered though they are not the trainer's and have no store.
_MOST_FOREIGN_SETS = 8
#: Entries of an evaluation's metrics that tell how long it took, not how good the model is.
_TIMINGS = ("_runtime", "_per_second", "_model_preparation_time")


@dataclass(frozen=True)
class UsersLoader:
    """What a loader is made of.

    Args:
        dataset: the user's.
        collator: the user's; another one makes other batches.
        inner: the data set without the columns that the model does not take.
        inner_collator: the collator without them.
        batch_size: rows of a batch.
        is_trainers: whether the data set is the trainer's, so that every evaluation will read it.
    """

    dataset: Any
    collator: Callable
    inner: Any
    inner_collator: Callable
    batch_size: int
    is_trainers: bool


class _CachedSet:
    """An evaluation set with its store."""

    def __init__(self, loader: UsersLoader, rows: RowSource):
        self.loader, self.rows = loader, rows
        self.switch = SourceSwitch(len(rows))
        self.source: FromStore | None = None
        self.trace: Trace | None = None
        #: Of the prefix that the store was made with.
        self.checksums: list[int] = []
        #: Cut for which no store could be made; None: none was declined.
        self.declined_cut: int | None = None
        self.augmentation: Augmentation | None = None
        self.evaluations, self.announced = 0, False

    def matches(self, loader: UsersLoader) -> bool:
        if self.loader.collator is not loader.collator:
            return False
        dataset, own = loader.dataset, self.loader.dataset
        if isinstance(dataset, datasets.Dataset) and isinstance(own, datasets.Dataset):
            return dataset._fingerprint == own._fingerprint
        return dataset is own


@dataclass
class EvaluationPass:
    """One evaluation of one data set.

    Args:
        loader: of the data set.
        prefix: of the metrics' names.
        settings: the other arguments of `Trainer.evaluation_loop`.
        source: where its batches came from.
        metrics: its result.
    """

    loader: DataLoader
    prefix: str
    settings: Mapping[str, Any]
    source: EpochSource
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def from_store(self) -> bool:
        """Whether its batches came from a store."""
        return isinstance(self.source, FromStore)


class EvaluationCache:
    """Stores of the evaluation sets' features at the current cut, for the evaluations of one training.

    The last evaluation runs on samples and once more from the store, so that both results can be compared. Whatever
    goes wrong is logged, and evaluations run on samples.

    Args:
        spec_maker: of the training.
        holdings: the training's stores, which share its budget.
        accounts: of the training.
        is_last: whether the training ends with this step, as far as is known.
    """

    def __init__(self, spec_maker: SpecMaker, holdings: Holdings, accounts: Accounts, is_last: Callable[[], bool]):
        self.spec_maker, self.holdings, self.accounts, self.is_last = spec_maker, holdings, accounts, is_last
        self.context = spec_maker.context
        self.chain, self.group = self.context.chain, self.context.group
        self.announcer = Announcer(self.group, logger)
        self._sets: list[_CachedSet] = []
        self._running: _CachedSet | None = None
        #: Of the outermost `evaluate`; None outside.
        self._passes: list[EvaluationPass] | None = None
        self._ended_from_store = False

    # Evaluations

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[list[EvaluationPass]]:
        """Collects the passes of one `Trainer.evaluate`, which calls itself for every entry of a dict.

        Yields:
            The passes so far; inside an outer `evaluate` an empty list, as the outer one collects them.
        """
        if self._passes is not None:
            yield []
            return
        self._passes = []
        try:
            yield self._passes
        finally:
            self._passes = None

    def record(self, evaluation_pass: EvaluationPass) -> None:
        """Notes that a pass has ended."""
        if self._passes is not None:
            self._passes.append(evaluation_pass)
            self._ended_from_store = evaluation_pass.from_store

    def second_source(self, first: EvaluationPass) -> EpochSource | None:
        """Where the batches come from when the last evaluation is repeated; None: it is not.

        An evaluation on samples is repeated from the store, if there is one. One from a store is repeated on samples:
        early stopping decides after an evaluation that it was the last.
        """
        if first.from_store:
            return FromImages(self.chain.cut)
        source = self._stored_source(first.loader)
        return source if isinstance(source, FromStore) else None

    def compare(self, on_images: Mapping[str, float], from_store: Mapping[str, float], prefix: str) -> None:
        """Logs the last evaluation's metrics on samples beside those from the store.

        Args:
            on_images: metrics named with the prefix.
            from_store: metrics named with the prefix and `_cached`.
            prefix: of the metrics' names.
        """
        self._ended_from_store = False
        pairs = []
        for name, cached in zip(_named(on_images, prefix), cached_names(on_images, prefix), strict=True):
            other = from_store.get(cached)
            if isinstance(other, float) and not name.endswith(_TIMINGS):
                pairs.append(f"{name} {on_images[name]:.6g} / {other:.6g}")
        if pairs:
            self.announcer.info(f"The last evaluation on samples / from cached features: {', '.join(pairs)}.")

    def stop(self) -> None:
        """The training has ended or broken off."""
        for entry in self._sets:
            if entry.source is not None:
                entry.source.close()
        if self._ended_from_store:
            self.announcer.warning(
                "The last evaluation of this training was from cached features (fp16); `trainer.evaluate()` runs on "
                "samples."
            )

    # Data

    def wrap(self, loader: UsersLoader) -> ReplayDataset | None:
        """The data set for a loader; None if its rows cannot be cached."""
        entry = next((entry for entry in self._sets if entry.matches(loader)), None)
        if entry is None:
            try:
                check_dataset(loader.inner)
            except ValueError:
                self.announcer.warning_once(
                    f"An evaluation set ({type(loader.dataset).__name__}) has no rows to cache: it is evaluated on "
                    "samples."
                )
                return None
            train = self.context.source
            rows = RowSource(
                loader.inner,
                loader.inner_collator,
                loader.batch_size,
                train.seed,
                train.num_workers,
                train.multiprocessing_context,
                train.texts,
            )
            with looking_at(rows):
                rows.combined = find_combined(rows)
            entry = _CachedSet(loader, rows)
            foreign = [entry for entry in self._sets if not entry.loader.is_trainers and entry.source is None]
            if len(foreign) == _MOST_FOREIGN_SETS:
                self._sets.remove(foreign[0])
            self._sets.append(entry)
        rows = entry.rows
        return ReplayDataset(loader.inner, entry.switch, rows.seed, rows.texts, together=bool(rows.combined))

    def prepare(self, loader: DataLoader) -> None:
        """Opens the store for the loader's data set at the current cut, or builds it if a further evaluation reads it.

        Called before the evaluation's clock begins. Does nothing outside `evaluation`: a loader that somebody asks for
        on one process alone must not wait for the others.

        Args:
            loader: of the evaluation.
        """
        entry, cut, builds = self._entry(loader), self.chain.cut, not self.is_last()
        if self._passes is None or entry is None or not cut:
            return
        entry.evaluations += builds
        if entry.declined_cut == cut or (not entry.loader.is_trainers and entry.evaluations <= 1):
            return  # a data set that is given once needs no store
        if entry.source is not None and entry.source.cut == cut:
            return
        try:
            with self.accounts.building(cut) as phase, looking_at(entry.rows):
                store, built = self._find_or_build(entry, cut, builds)
                if store is not None and built:
                    phase.add_store(store.bytes)
        except Exception as error:  # an optional thing: nothing that goes wrong here may cost a training
            entry.declined_cut = cut
            self.announcer.failure(
                f"There is no store of the evaluation set for cut {cut}, so evaluations run on samples", error
            )

    # Replay

    def source_of(self, loader: DataLoader) -> EpochSource:
        """Where the batches of an evaluation that begins now come from."""
        return FromImages(self.chain.cut) if self.is_last() else self._stored_source(loader)

    @contextlib.contextmanager
    def replaying(self, loader: DataLoader, source: EpochSource) -> Iterator[None]:
        """Inside, the loader's samples come from the source."""
        entry = self._entry(loader)
        if entry is None or not isinstance(source, FromStore):
            yield
            return
        self._running = entry
        entry.switch.epoch = 0  # every evaluation counts its rows anew
        source.turn(entry.switch)
        try:
            with entry.switch.requesting(once=True):
                yield
        finally:
            self._running = None

    @property
    def is_replaying(self) -> bool:
        """Whether an evaluation from a store is running."""
        return self._running is not None

    @contextlib.contextmanager
    def prediction_step(self, batch: dict[str, Any], force_eager: bool) -> Iterator[dict[str, Any]]:
        """Yields the inputs for one batch of an evaluation; codes are decoded and the prefix is bypassed.

        Args:
            batch: of samples, or of codes.
            force_eager: run compiled code uncompiled where the prefix is bypassed.
        """
        entry = self._running
        if entry is None or entry.source is None or entry.trace is None:
            yield batch
            return
        with self.chain.traced(entry.trace):
            step: StepInputs = entry.source.step_inputs(batch, replace(self.context, source=entry.rows))
            with bypassing(self.chain, step, force_eager):
                yield step.inputs

    def images_of(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of the running evaluation from samples."""
        assert self._running is not None  # called inside `replaying` only
        rows = replace(self.context, source=self._running.rows)
        with preserve_rng():
            return FromImages(self.chain.cut).step_inputs(batch, rows).inputs

    def decline(self, loader: DataLoader, error: Exception) -> EpochSource:
        """Takes samples for a loader's data set at this cut, as evaluations fail on features; returns that source."""
        entry = self._entry(loader)
        if entry is not None:
            entry.source, entry.declined_cut = None, self.chain.cut
        self.announcer.failure("Evaluations cannot run on features, so they run on samples", error)
        return FromImages(self.chain.cut)

    # Helpers

    def _entry(self, loader: DataLoader) -> _CachedSet | None:
        """The data set of a loader that `wrap` has made one for, whoever made the loader."""
        switch = find_switch(loader)
        if switch is None or not isinstance(loader.collate_fn, ReplayCollator):
            return None
        return next((entry for entry in self._sets if entry.switch is switch), None)

    def _stored_source(self, loader: DataLoader) -> EpochSource:
        """The store of a loader's data set, if it is valid for the model as it is now; else samples.

        Outside `evaluation` always samples: nobody would repeat such a pass on samples at the end.
        """
        images, entry = FromImages(self.chain.cut), self._entry(loader)
        if self._passes is None or entry is None or entry.source is None:
            return images
        if entry.source.cut != self.chain.cut or len(entry.source.store) != len(entry.rows):
            return images
        if all(self.group.gather(self._checksums() == entry.checksums)):
            return entry.source
        self.announcer.warning_once(
            "The frozen prefix has other weights than when the store of the evaluation set was built (averaged "
            "weights, a loaded checkpoint?): evaluations of such a model run on samples."
        )
        return images

    def _find_or_build(self, entry: _CachedSet, cut: int, builds: bool) -> tuple[FeatureStore | None, bool]:
        """The store of a data set, None if there is none and none is built; and whether it was built now."""
        probe = self.group.on_all(lambda: self.context.model_inputs(entry.rows.probe()))
        with contextlib.ExitStack() as stack:
            # Of its own: the evaluation's samples may have another size than those of the training.
            trace = self.group.on_all(lambda: stack.enter_context(self.chain.traced(probe)))
            limit = self.group.on_main(self._limit)
            augmentation = self._survey(entry)
            spec = self.spec_maker.make_evaluation(entry.rows, probe, cut, limit, augmentation.random)
            spec = replace(spec, owner=self.holdings.owner)
            reuse = self.spec_maker.reuse
            store = reuse.open(spec)
            if store is None and not builds:
                return None, False
            self._announce_randomness(entry, augmentation)
            built = store is None or reuse.has_made(store)
            if store is None:
                store = self._build(reuse.current(spec), entry)
                reuse.upload(store)
        outdated, entry.source, entry.trace = entry.source, FromStore(cut, store), trace
        if self.group.is_main:
            store.hold()
        is_own = self.group.on_main(lambda: is_owned(store.path, self.holdings.owner))
        self.holdings.add(store.path, store.total_bytes, is_own, cut, is_evaluation=True)
        entry.checksums = self._checksums()
        if outdated is not None and outdated.store.path != store.path:
            self._remove(outdated.store)
        if built:
            self.announcer.warning(
                f"Built the store of the evaluation set {store.path} ({show_bytes(store.bytes)}, {EVALUATION_CODEC}, "
                f"{len(store)} samples): evaluations during training do not run {cut} of {len(self.chain)} blocks any "
                "more."
            )
        else:
            self.announcer.info(f"Reusing the store of the evaluation set {store.path}.")
        return store, built

    def _build(self, spec: StoreSpec, entry: _CachedSet) -> FeatureStore:
        try:
            return materialize(spec, self.group)
        except OverLimit as error:
            if entry.source is None or not self.holdings.has_built(entry.source.store.path):
                raise
            # Of an earlier cut, which never comes back.
            outdated, entry.source = entry.source, None
            self._remove(outdated.store)
            limit = self.group.on_main(self._limit)
            if limit is not None and error.needed > limit:
                raise OverLimit(error.needed, limit) from error
            return materialize(replace(spec, limit=limit), self.group)

    def _limit(self) -> int | None:
        limit = self.holdings.limit()
        return limit if self.context.config.cache == "always" else disk_limit(self.context.cache_dir, limit)

    def _checksums(self) -> list[int]:
        return list(checksums(self.chain.prefix_state(self.chain.cut)).values())

    def _survey(self, entry: _CachedSet) -> Augmentation:
        """What is random in the samples.

        Raises:
            Declined: if they cannot be cached at all.
        """
        if entry.augmentation is None:
            entry.augmentation = self.group.on_main(lambda: survey(entry.rows, self.chain.main_input))
        if entry.augmentation.declined is not None:
            raise Declined(entry.augmentation.declined)
        return entry.augmentation

    def _announce_randomness(self, entry: _CachedSet, augmentation: Augmentation) -> None:
        if entry.announced:
            return
        entry.announced = True
        if augmentation.random:
            repeated = "the base view of its ReplayableTransform" if augmentation.replayable else "one draw of it"
            self.announcer.warning(
                f"The evaluation set is random (transform or collator): evaluations from its store repeat {repeated}, "
                "those on samples draw anew."
            )

    def _remove(self, store: FeatureStore) -> None:
        if self.holdings.has_built(store.path):
            try:
                self.group.on_main(lambda: remove_store(store.path))
            except OSError as error:  # it still counts
                self.announcer.failure("An outdated store of the evaluation set could not be deleted", error)
                return
        self.holdings.drop(store.path)


def cached_names(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    """The metrics of an evaluation under the names that they have if it is from the store; `epoch` is none."""
    return {f"{prefix}_cached{name.removeprefix(prefix)}": metrics[name] for name in _named(metrics, prefix)}


def _named(metrics: Mapping[str, float], prefix: str) -> list[str]:
    return [name for name in metrics if name.startswith(f"{prefix}_")]
