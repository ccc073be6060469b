"""Evaluations during training from cached features: the frozen prefix is not run on the evaluation set either."""

from __future__ import annotations

import contextlib
import logging as python_logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader
from transformers.utils import logging

from ..build.feature_sources import ImageFeatures
from ..build.materialize import OverLimit, materialize, open_matching
from ..build.spec_maker import SpecMaker
from ..build.store_spec import StoreSpec
from ..build.survey import survey
from ..cache.fingerprint import fingerprint_inputs
from ..cache.holdings import Holdings, disk_limit
from ..cache.lossless import LOSSLESS
from ..cache.manifest import FORMAT_VERSION
from ..cache.rows import RowSource, check_dataset
from ..cache.store import FeatureStore, remove_store
from ..model.tracing import Trace
from ..replay.collator import ReplayCollator, take_codes
from ..replay.dataset import EvaluationDataset, SourceSwitch
from ..replay.decode import replay_features
from ..rng import preserve_rng

logger = logging.get_logger(__name__)

#: Half precision: what evaluation reports should be the model's, not the codec's.
_CODEC = "fp16"
#: Data sets that are remembered though they are not the trainer's and have no store.
_MOST_STRANGERS = 8
#: Entries of an evaluation's metrics that say how long it took, not how good the model is.
_TIMINGS = ("_runtime", "_per_second", "_model_preparation_time")

Metrics = dict[str, float]


class _CachedSet:
    """An evaluation set with its store.

    Args:
        dataset: the user's.
        users_collator: the user's; another one makes other batches.
        source: the samples, unused columns removed.
        own: whether it is the trainer's, so that every evaluation will read it.
    """

    def __init__(self, dataset: Any, users_collator: Callable, source: RowSource, own: bool):
        self.dataset, self.users_collator, self.source, self.own = dataset, users_collator, source, own
        self.switch = SourceSwitch()
        self.store: FeatureStore | None = None
        self.trace: Trace | None = None
        #: Of the prefix that the store was made with.
        self.checksums: list[int] = []
        self.declined_cut, self.evaluations, self.surveyed = 0, 0, False

    def matches(self, dataset: Any, users_collator: Callable) -> bool:
        if self.users_collator is not users_collator:
            return False
        if isinstance(dataset, datasets.Dataset) and isinstance(self.dataset, datasets.Dataset):
            return dataset._fingerprint == self.dataset._fingerprint
        return dataset is self.dataset


@dataclass
class _Pass:
    """One evaluation of one data set.

    Args:
        images: whether it must not be from a store.
        build: whether a store that is missing is built for it: whether a further evaluation would read it.
        replayed: whether it was from a store.
    """

    images: bool
    build: bool = False
    replayed: bool = False


class EvaluationCache:
    """Keeps the evaluation sets' features at the current cut, for the evaluations of one training.

    The last evaluation runs on images and is repeated from the store, so that both results can be compared. Whatever
    goes wrong is said once, and evaluations go on from images.

    Args:
        spec_maker: of the training, whose model, cache directory and processes are the same.
        holdings: the training's stores, which share its budget.
        to_device: moves a batch to where the model is.
    """

    def __init__(
        self,
        spec_maker: SpecMaker,
        holdings: Holdings,
        to_device: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    ):
        self.spec_maker, self.holdings, self.to_device = spec_maker, holdings, to_device
        self.model, self.chain, self.group = spec_maker.model, spec_maker.chain, spec_maker.group
        self._sets: list[_CachedSet] = []
        self._running: _CachedSet | None = None
        self._pass: _Pass | None = None
        #: Data set and prefix of the evaluations that the outermost `evaluate` has answered from stores.
        self._answered: list[tuple[Any, str]] = []
        self._ended_from_cache = False
        self._said: set[str] = set()

    # Evaluating

    def evaluate(
        self,
        dataset: Any,
        prefix: str,
        *,
        evaluate: Callable[[Any, str], Metrics],
        again: Callable[[Any, str], Metrics],
        is_last: Callable[[], bool],
        log_history: list[dict[str, Any]],
    ) -> Metrics:
        """An evaluation during training: from stores, the last one on images and from stores.

        Args:
            dataset: as `Trainer.evaluate` takes it: None and names are the trainer's own.
            prefix: of the metrics' names.
            evaluate: `Trainer.evaluate`; it comes back here for every entry of a dict.
            again: evaluates and logs, but does not call `on_evaluate`; an empty dict if it should be from a store and
                there is none.
            is_last: whether the training ends here, as far as is known.
            log_history: what was logged.

        Returns:
            The metrics under their usual names; those of the last evaluation are the ones on images.
        """
        outermost = self._pass is None
        if outermost:
            self._answered.clear()
        metrics = self._evaluate(dataset, prefix, evaluate, again, is_last)
        if outermost and self._answered and is_last():
            # Early stopping decides after the evaluation, which was from stores.
            for answered, its_prefix in self._answered:
                cached = _rename_logged(log_history, its_prefix)
                with self._passing(images=True), preserve_rng():
                    on_images = again(answered, its_prefix)
                self._compare(on_images, cached, its_prefix)
                metrics.update({name: value for name, value in on_images.items() if name in metrics})
            self._ended_from_cache = False
        return metrics

    def _evaluate(self, dataset: Any, prefix: str, evaluate: Callable, again: Callable, is_last: Callable) -> Metrics:
        last = is_last()
        with self._passing(images=last, build=not last) as one:
            metrics = evaluate(dataset, prefix)
        if isinstance(dataset, dict):
            return metrics
        if last:
            with self._passing(images=False), preserve_rng():
                self._compare(metrics, again(dataset, f"{prefix}_cached"), prefix)
        elif one.replayed:
            self._answered.append((dataset, prefix))
        self._ended_from_cache = one.replayed
        return metrics

    @contextlib.contextmanager
    def _passing(self, images: bool, build: bool = False) -> Iterator[_Pass]:
        outer, self._pass = self._pass, _Pass(images, build)
        try:
            yield self._pass
        finally:
            self._pass = outer

    @property
    def wants_images(self) -> bool:
        """Whether the evaluation that is going on must not be from a store."""
        return self._pass is None or self._pass.images

    def stop(self) -> None:
        """The training has ended or broken off."""
        if self._ended_from_cache:
            self._say(
                "The last evaluation of this training was from cached features (fp16); `trainer.evaluate()` runs on "
                "images."
            )

    # Data

    def wrap(
        self, dataset: Any, inner: Any, users_collator: Callable, collator: Callable, batch_size: int, own: bool
    ) -> EvaluationDataset | None:
        """The data set for a loader; None if its rows cannot be cached.

        Args:
            dataset: the user's.
            inner: the same, unused columns removed.
            users_collator: the user's.
            collator: the same, unused columns removed.
            batch_size: rows of a batch.
            own: whether it is the trainer's.
        """
        entry = next((entry for entry in self._sets if entry.matches(dataset, users_collator)), None)
        if entry is None:
            try:
                check_dataset(inner)
            except ValueError:
                self._say_once(
                    f"An evaluation set ({type(dataset).__name__}) has no rows to cache: no cached evaluation."
                )
                return None
            train = self.spec_maker.source
            source = RowSource(
                inner, collator, batch_size, train.seed, train.num_workers, train.multiprocessing_context
            )
            entry = _CachedSet(dataset, users_collator, source, own)
            strangers = [entry for entry in self._sets if not entry.own and entry.store is None]
            if len(strangers) == _MOST_STRANGERS:
                self._sets.remove(strangers[0])
            self._sets.append(entry)
        return EvaluationDataset(inner, entry.switch, entry.source.seed)

    def needs_store(self, loader: DataLoader) -> bool:
        """Whether `prepare` has something to do before an evaluation that may be from a store."""
        entry = self._entry(loader)
        if entry is None or self.wants_images or not self.chain.cut:
            return False
        entry.evaluations += 1
        if entry.declined_cut == self.chain.cut or (not entry.own and entry.evaluations == 1):
            return False  # a data set that is given once needs no store
        return entry.store is None or entry.store.manifest.cut != self.chain.cut

    def prepare(self, loader: DataLoader) -> FeatureStore | None:
        """Opens the store for the loader's data set at the current cut, or builds it if that pays.

        Args:
            loader: of the evaluation.

        Returns:
            The store, if it was built now.
        """
        entry, cut = self._entry(loader), self.chain.cut
        try:
            with preserve_rng():
                return self._prepare(entry, cut)
        except Exception as error:  # an optional thing: nothing that goes wrong here may cost a training
            entry.declined_cut = cut
            self._say(f"No store of the evaluation set for cut {cut}, evaluations go on from images: {error}")
            return None

    def _prepare(self, entry: _CachedSet, cut: int) -> FeatureStore | None:
        probe = self.group.on_all(lambda: self.spec_maker.model_inputs(entry.source.probe()))
        with contextlib.ExitStack() as stack:
            # Of its own: the evaluation's images may have another size than those of the training.
            trace = self.group.on_all(lambda: stack.enter_context(self.chain.traced(probe)))
            spec = self._make_spec(entry, probe, cut)
            store = open_matching(spec, self.group)
            if store is None and not self._pass.build:
                return None
            self._say_what_is_random(entry)
            built = store is None
            if built:
                store = self._build(spec, entry)
        outdated, entry.store, entry.trace = entry.store, store, trace
        self.holdings.add(store.path, store.total_bytes, built, evaluation_cut=cut)
        entry.checksums = self._checksums(cut)
        if outdated is not None and outdated.path != store.path:
            self._remove(outdated)
        if not built:
            self._say(f"Reusing the store of the evaluation set {store.path}.", python_logging.INFO)
            return None
        self._say(
            f"Built the store of the evaluation set {store.path} ({store.bytes / 1e6:.1f} MB, {_CODEC}, {len(store)} "
            f"samples): {cut} of {len(self.chain)} blocks are not run any more in evaluations during training."
        )
        return store

    def _build(self, spec: StoreSpec, entry: _CachedSet) -> FeatureStore:
        try:
            return materialize(spec, self.group)
        except OverLimit as error:
            if entry.store is None or not self.holdings.has_built(entry.store.path):
                raise
            # Of an earlier cut, which never comes back.
            outdated, entry.store = entry.store, None
            self._remove(outdated)
            limit = self.group.on_main(self._limit)
            if limit is not None and error.needed > limit:
                raise OverLimit(error.needed, limit) from error
            return materialize(replace(spec, limit=limit), self.group)

    def _make_spec(self, entry: _CachedSet, probe: Mapping[str, Any], cut: int) -> StoreSpec:
        source, chain, lossless = entry.source, self.chain, self.spec_maker.config.lossless

        def made_from() -> dict[str, Any]:
            inputs = fingerprint_inputs(
                # Whose store it is stands there too: an outdated one is taken away, a training's is not.
                augmentation={"views": 0, "for": "evaluation"},
                source=source,
                model=self.model,
                tensors=self._prefix(cut),
                cut=cut,
                blocks=chain.names[:cut],
                codec=_CODEC,
                precision=self.spec_maker.precision,
                format_version=FORMAT_VERSION,
            )
            return {**inputs, **LOSSLESS} if lossless else inputs

        self.group.on_all(lambda: chain.prove(probe, cut))
        layout = chain.layout(cut)
        return StoreSpec(
            chain=chain,
            cut=cut,
            source=source,
            codec=_CODEC,
            layout=layout,
            made_from=self.group.on_main(made_from),
            directory=self.spec_maker.cache_dir,
            feature_source=ImageFeatures(chain, cut, source, layout, self.spec_maker.counting(0, cut)),
            disable_tqdm=self.spec_maker.disable_tqdm,
            limit=self.group.on_main(self._limit),
            lossless=lossless,
        )

    def _limit(self) -> int | None:
        room = self.holdings.limit()
        return room if self.spec_maker.config.cache == "always" else disk_limit(self.spec_maker.cache_dir, room)

    # Replay

    def replays(self, loader: DataLoader) -> bool:
        """Whether an evaluation of this loader that begins now is from a store."""
        entry = self._entry(loader)
        if entry is None or entry.store is None or self.wants_images:
            return False
        if entry.store.manifest.cut != self.chain.cut or len(entry.store) != len(loader.dataset):
            return False
        if all(self.group.gather(self._checksums(self.chain.cut) == entry.checksums)):
            return True
        self._say_once(
            "The frozen prefix has other weights than when the store of the evaluation set was built (averaged "
            "weights, a loaded checkpoint?): evaluations of such a model run on images."
        )
        return False

    @contextlib.contextmanager
    def replaying(self, loader: DataLoader) -> Iterator[None]:
        """Inside, the loader's samples come from the store."""
        entry = self._entry(loader)
        self._pass.replayed = True
        self._running = entry
        entry.switch.set(entry.store.path)
        try:
            yield
        finally:
            entry.switch.set(None)
            self._running = None

    @contextlib.contextmanager
    def prediction_step(self, inputs: Mapping[str, Any], force_eager: bool) -> Iterator[Mapping[str, Any]]:
        """Yields the inputs for one batch of an evaluation; codes are decoded and the prefix is bypassed.

        Args:
            inputs: a batch of images as it is, or one from the store.
            force_eager: run compiled code uncompiled where the prefix is bypassed.
        """
        taken = take_codes(inputs)
        if taken is None or self._running is None:
            yield inputs
            return
        codes, others = taken
        entry, store = self._running, self._running.store
        features = replay_features(store, self.to_device(codes))
        eager = torch.compiler.set_stance("force_eager") if force_eager else contextlib.nullcontext()
        with self.chain.traced(entry.trace), self.chain.replay(store.manifest.cut), eager:
            yield {self.chain.main_input: features, **others}

    # Helpers

    def _entry(self, loader: DataLoader) -> _CachedSet | None:
        """The data set of a loader that `wrap` has made one for, whoever made the loader."""
        dataset = getattr(loader, "dataset", None)
        if not isinstance(dataset, EvaluationDataset) or not isinstance(loader.collate_fn, ReplayCollator):
            return None
        return next((entry for entry in self._sets if entry.switch is dataset.switch), None)

    def _prefix(self, cut: int) -> dict[str, torch.Tensor]:
        return {**self.chain.prefix_parameters(cut), **self.chain.prefix_buffers(cut)}

    def _checksums(self, cut: int) -> list[int]:
        return [_sum_of_bits(tensor) for tensor in self._prefix(cut).values()]

    def _say_what_is_random(self, entry: _CachedSet) -> None:
        if entry.surveyed:
            return
        entry.surveyed = True
        found = self.group.on_main(lambda: survey(entry.source, self.chain.main_input))
        if found.random:
            repeated = "the base view of its ReplayableTransform" if found.replayable else "one draw of it"
            self._say(
                f"The evaluation set is random (transform or collator): evaluations from its store repeat {repeated}, "
                "those on images draw anew."
            )

    def _remove(self, store: FeatureStore) -> None:
        if self.holdings.has_built(store.path):
            try:
                self.group.on_main(lambda: remove_store(store.path))
            except OSError as error:
                self._say(f"An outdated store of the evaluation set could not be removed: {error}")
        self.holdings.drop(store.path)

    def _compare(self, on_images: Metrics, cached: Metrics, prefix: str) -> None:
        pairs = []
        for name, value in on_images.items():
            other = cached.get(f"{prefix}_cached{name.removeprefix(prefix)}")
            if isinstance(other, float) and not name.endswith(_TIMINGS):
                pairs.append(f"{name} {value:.6g} / {other:.6g}")
        if pairs:
            what = f"The last evaluation on images / from cached features: {', '.join(pairs)}."
            self._say(what, python_logging.INFO)

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            self._say(message)

    def _say(self, message: str, level: int = python_logging.WARNING) -> None:
        if self.group.rank == 0:
            logger.log(level, message)


def _rename_logged(log_history: list[dict[str, Any]], prefix: str) -> Metrics:
    """Puts `_cached` behind the prefix in the last logged evaluation; returns it as it is then."""
    for entry in reversed(log_history):
        if f"{prefix}_runtime" in entry:
            renamed = {
                name.replace(prefix, f"{prefix}_cached", 1) if name.startswith(f"{prefix}_") else name: value
                for name, value in entry.items()
            }
            entry.clear()
            entry.update(renamed)
            return renamed
    return {}


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _sum_of_bits(tensor: torch.Tensor) -> int:
    """A number that changes with the values and costs no more than reading them."""
    values = tensor.detach().contiguous()
    return int(values.view(_BITS[values.element_size()]).sum(dtype=torch.int64)) if values.numel() else 0
