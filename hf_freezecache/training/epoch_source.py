"""Where an epoch's batches come from, as a value: samples, samples whose features a store keeps, or a store."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging

from ..build.context import BuildContext
from ..build.errors import GeometryMisfit
from ..build.feature_sources import ViewRun
from ..build.partial import PartialStore
from ..cache.rows import split_batch
from ..cache.store import FeatureStore
from ..distributed import Announcer, describe_error
from ..model.chain import BlockChain
from ..model.layout import FeatureLayout
from ..model.modes import uncompiled
from ..replay.collator import SIZE, DrawnViews, take_codes, take_drawn, take_lost
from ..replay.dataset import live_batch
from ..replay.decode import replay_features
from ..replay.requests import SourceSwitch, WriteRound, store_number

logger = logging.get_logger(__name__)

#: Entry of a source's state that names its class.
KIND = "kind"


@dataclass(frozen=True)
class StepInputs:
    """A collated batch as the model takes it.

    Args:
        inputs: model inputs and labels by name; what the loader returned, where the model runs whole. Beside features,
            the main input is a stand-in, or integers.
        samples: rows of the batch.
        bypassed: cut up to which the model is not run, as its features are given; 0: all of it runs.
        mode: key of the step's FLOPs, `live` or `replay`.
        features: `(samples, *layout.shape)`; None where the model runs on its main input.
        layout: of the features.
    """

    inputs: dict[str, Any]
    samples: int
    bypassed: int = 0
    mode: str = "live"
    features: torch.Tensor | None = None
    layout: FeatureLayout | None = None

    @classmethod
    def on_features(
        cls, chain: BlockChain, cut: int, features: torch.Tensor, batch: Mapping[str, Any], mode: str
    ) -> StepInputs:
        """Those of a batch whose features at a cut are known; of its main input nothing but integers counts."""
        main_input = chain.input_of_replay(features, batch)
        inputs = {**batch, chain.main_input: main_input}
        return cls(inputs, len(features), cut, mode, features, chain.padding.layout_of(inputs, cut))


class EpochSource(ABC):
    """Where the batches of an epoch come from. A closed family: `FromImages`, `Writing`, `FromStore`.

    Attributes:
        cut: frozen blocks that it was chosen for.
        mode: mode of the epoch in the report, `live` or `replay`.
    """

    cut: int
    mode = "live"

    @property
    def store_bytes(self) -> int:
        """Bytes on the disk that the epoch reads or writes."""
        return 0

    @abstractmethod
    def turn(self, switch: SourceSwitch) -> None:
        """Sets where rows come from that the training asks for from now on."""

    @abstractmethod
    def step_inputs(self, batch: dict[str, Any], context: BuildContext) -> StepInputs:
        """Turns a collated batch of this source into model inputs.

        Args:
            batch: as the loader returned it. One that a user has made of samples is taken as it is in every epoch.
            context: the model.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """JSON values for the checkpoint; `load_source` reads them."""

    def close(self) -> None:  # noqa: B027 - batches of samples leave nothing to do
        """Closes files that are written, and tells other runs that stores are not used any more."""


class FromImages(EpochSource):
    """Batches of samples; the model runs whole.

    Args:
        cut: frozen blocks that it was chosen for.
        why: why there is no store, as the end of a sentence; None at cut 0.
        lost_in: the epoch in which the store was lost, whose rest runs on samples; None: all epochs of the cut do.
    """

    def __init__(self, cut: int = 0, why: str | None = None, lost_in: int | None = None):
        self.cut, self.why, self.lost_in = cut, why, lost_in

    def lasts(self, epoch: int) -> bool:
        """Whether an epoch of its cut runs on samples, too, without anybody asking for a store."""
        return self.lost_in is None or self.lost_in == epoch

    def turn(self, switch: SourceSwitch) -> None:
        switch.set(None)

    def step_inputs(self, batch: dict[str, Any], context: BuildContext) -> StepInputs:
        return _live(batch, context)

    def state_dict(self) -> dict[str, Any]:
        return {KIND: "images", "cut": self.cut, "why": self.why, "lost_in": self.lost_in}


class FromStore(EpochSource):
    """Batches of codes from a store; the prefix is bypassed.

    Args:
        cut: frozen blocks of the store.
        store: the store; None if a checkpoint names it and nobody has opened it since.
    """

    mode = "replay"

    def __init__(self, cut: int, store: FeatureStore | None):
        self.cut, self._store = cut, store

    @property
    def is_open(self) -> bool:
        """Whether the store is open."""
        return self._store is not None

    @property
    def store(self) -> FeatureStore:
        """The store.

        Raises:
            RuntimeError: if nobody has opened it since the training was resumed.
        """
        if self._store is None:
            raise RuntimeError(f"the store of cut {self.cut} was not opened since the training was resumed.")
        return self._store

    @property
    def store_bytes(self) -> int:
        return self.store.bytes

    def turn(self, switch: SourceSwitch) -> None:
        switch.set(self.store.path, self.store.handle)

    def step_inputs(self, batch: dict[str, Any], context: BuildContext) -> StepInputs:
        replayed = take_codes(batch)
        if replayed is None or not (replayed.rows.stores == store_number(self.store.path)).all():
            return _live(batch, context)
        codes = {name: value.to(context.device, non_blocking=True) for name, value in replayed.codes.items()}
        inputs, size = replayed.inputs, codes.pop(SIZE, None)
        features = replay_features(self.store, codes)
        if size is not None:
            inputs = with_main_input(context.chain, inputs, size)
            features = context.chain.padding.fit_features(features, context.model_inputs(inputs), self.cut)
        return StepInputs.on_features(context.chain, self.cut, features, inputs, "replay")

    def state_dict(self) -> dict[str, Any]:
        return {KIND: "store", "cut": self.cut}

    def close(self) -> None:
        if self._store is not None:
            self._store.release()


@dataclass(frozen=True)
class Problem:
    """Why an epoch's features could not be written.

    Args:
        is_misfit: whether a view's geometry does not fit: a build may still do.
        reason: as the end of a sentence.
        epoch: the epoch at whose end it counts, on all processes together.
    """

    is_misfit: bool
    reason: str
    epoch: int


class Writing(EpochSource):
    """Live batches whose features train the suffix as they are, and go to a store as codes.

    With V augmented views, V + 1 epochs after the freeze run so. In each of them every sample is drawn as another one
    of its views, as the store would draw it. What cannot be written costs the training nothing: the first problem is
    remembered, and the next epoch's beginning deals with it.

    Args:
        cut: frozen blocks.
        store: what is written; a complete store where a training that was resumed from before the freeze repeats the
            epochs that have written it; None if a checkpoint names it and nobody has opened it since.
        start: the first epoch that writes.
        epoch: the running epoch.
        problem: why nothing is written any more.
        name: directory name of the future store.
    """

    def __init__(
        self,
        cut: int,
        store: PartialStore | FeatureStore | None,
        start: int,
        epoch: int,
        problem: Problem | None = None,
        name: str | None = None,
    ):
        self.cut, self.store, self.start, self.epoch, self.problem = cut, store, start, epoch, problem
        self.name = _store_name(store) if store is not None else name

    @property
    def round(self) -> int:
        """How many epochs have been written before this one."""
        return self.epoch - self.start

    def rounds(self) -> int:
        """How many epochs write in all."""
        return self.opened.views.spec.count + 1

    @property
    def store_bytes(self) -> int:
        return self.store.bytes if isinstance(self.store, PartialStore) else 0

    def turn(self, switch: SourceSwitch) -> None:
        spec, layout = self.opened.views.spec, self.opened.codec.layout
        geometry = None if spec.geometry is None or layout.grid is None else (spec.geometry, layout.grid)
        switch.write(WriteRound(self.round, spec.count, geometry))

    def step_inputs(self, batch: dict[str, Any], context: BuildContext) -> StepInputs:
        views_and_batch = take_drawn(batch)
        if views_and_batch is None:
            return _live(batch, context)
        views, batch = views_and_batch
        chain = context.chain
        features = chain.prefix(context.model_inputs(batch), self.cut)
        self._write(views, batch, features, chain.main_input)
        return StepInputs.on_features(chain, self.cut, features, batch, "live")

    def state_dict(self) -> dict[str, Any]:
        problem = self.problem
        return {
            KIND: "writing",
            "cut": self.cut,
            "store": self.name,
            "start": self.start,
            "epoch": self.epoch,
            "problem": None if problem is None else [problem.is_misfit, problem.reason, problem.epoch],
        }

    def close(self) -> None:
        if isinstance(self.store, PartialStore):
            self.store.close()

    @property
    def opened(self) -> PartialStore | FeatureStore:
        """The store.

        Raises:
            RuntimeError: if nobody has opened it since the training was resumed.
        """
        if self.store is None:
            raise RuntimeError(f"the store of cut {self.cut} was not opened since the training was resumed.")
        return self.store

    def _write(self, views: DrawnViews, batch: Mapping[str, Any], features: torch.Tensor, main_input: str) -> None:
        if self.problem is not None or not isinstance(self.store, PartialStore):
            return
        try:
            split = split_batch(batch, main_input)
            view_run = ViewRun(split.columns, split.constants, features, views.geometry, views.refused)
            self.store.write(views.rows.numbers.tolist(), views.views.cpu().numpy(), view_run)
        except GeometryMisfit as misfit:
            self.problem = Problem(True, str(misfit), self.epoch)
        except Exception as error:  # the step needs no store, and the other processes wait for it
            Announcer.trace(logger, "An epoch's features could not be written", error)
            self.problem = Problem(False, describe_error(error), self.epoch)


def with_main_input(chain: BlockChain, inputs: Mapping[str, Any], size: torch.Tensor) -> dict[str, Any]:
    """A replayed batch with a stand-in for its main input, unless it has one.

    Args:
        chain: the model.
        inputs: of the batch, by name.
        size: of the shape of its main input, and 0.
    """
    stand_in = chain.own_trace().main_stand_in(len(size), size.device, tuple(size.shape[1:-1]))
    return {chain.main_input: stand_in, **inputs}


def live_shapes(chain: BlockChain, batch: dict[str, Any]) -> dict[str, Any]:
    """A replayed batch with a stand-in for its main input, of the live batch's shape; other batches as they are.

    The stand-in holds -1 everywhere, which is no padding.
    """
    replayed = take_codes(batch)
    if replayed is None:
        return batch
    if chain.main_input in replayed.inputs:
        return replayed.inputs
    size = replayed.codes.get(SIZE)
    shape = chain.input_shape if size is None else size.shape[1:-1]
    stand_in = torch.full((1,), -1).expand(len(replayed.rows.numbers), *shape)
    return {chain.main_input: stand_in, **replayed.inputs}


def load_source(state: Mapping[str, Any]) -> EpochSource:
    """The source that a checkpoint describes; its store is not opened yet."""
    cut = state["cut"]
    if state[KIND] == "images":
        return FromImages(cut, state["why"], state.get("lost_in"))
    if state[KIND] == "store":
        return FromStore(cut, None)
    problem = None if state["problem"] is None else Problem(*state["problem"])
    return Writing(cut, None, state["start"], state["epoch"], problem, state["store"])


def _live(batch: dict[str, Any], context: BuildContext) -> StepInputs:
    """Runs the model whole. Batches of another source, which a loader kept from an earlier epoch, are made live."""
    drawn, replayed, lost = take_drawn(batch), take_codes(batch), take_lost(batch)
    if lost is not None:
        batch = live_batch(context.source, lost[1])
    elif drawn is not None:
        batch = drawn[1]
    elif replayed is not None:
        batch = live_batch(context.source, replayed.rows)
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, Sequence) else ()
    return StepInputs(batch, next((len(value) for value in values if isinstance(value, torch.Tensor)), 0))


def _store_name(store: PartialStore | FeatureStore) -> str:
    return store.spec.path.name if isinstance(store, PartialStore) else store.path.name


@contextlib.contextmanager
def bypassing(chain: BlockChain, step: StepInputs, force_eager: bool) -> Iterator[None]:
    """Inside, the model runs on the features of a step where it has some; else it runs whole.

    Args:
        chain: the model.
        step: what it is called on.
        force_eager: run compiled code uncompiled: it would run the bypassed blocks.
    """
    main_input = step.inputs[chain.main_input] if step.bypassed else None
    with chain.replay(step.bypassed, step.features, main_input), uncompiled(force_eager and bool(step.bypassed)):
        yield
