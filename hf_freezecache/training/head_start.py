"""A head start: the head alone is trained on features of the untouched model, before the first step.

A new head sends gradients of no use into pretrained blocks; one that is trained first leaves them as they are (linear
probing, then fine-tuning: Kumar et al. 2022, arXiv 2202.10054, section 4). All that runs before the head runs once, on
each sample as the base view has it; blocks before a cut whose features are in a store do not run for it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR
from transformers.utils import logging

from ..build.context import BuildContext
from ..cache.shelf import TensorShelf
from ..cache.store import FeatureStore
from ..distributed import Announcer, describe_error
from ..model.freshness import is_untrained
from ..model.head import Head
from ..model.modes import untouched
from ..model.stand_ins import FrozenOutputError
from ..rng import preserve_rng, seeded_rng
from ..units import show_bytes, show_seconds
from .epoch_source import with_main_input
from .head_batches import FEATURES, OWN_SIZE, HeadBatch, HeadBatches
from .rehearsal import Outcome, RehearsalError, Rehearsing, Step

logger = logging.get_logger(__name__)

#: Learning rates among which one is chosen.
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
#: Memory that features may take; more of them wait in a temporary file.
_MOST_BYTES = 2**30
#: Batches by which a learning rate is chosen, at most, and the share of them that is held out.
_SEARCH_BATCHES, _HELD_OUT = 40, 0.2
#: Batches on which the loss is compared before and after.
_LOSS_BATCHES = 16


@dataclass(frozen=True)
class HeadStarted:
    """What a head start has done.

    Args:
        rows: samples on which the head was trained, of this process.
        is_from_store: whether their features come from the store of the first cut.
        parameters: names of what was trained.
        rate: learning rate, chosen or given.
        loss_before, loss_after: mean over some training batches.
        steps: optimizer steps, those of the choice of a learning rate included.
        passes: forward passes of one sample through the whole model that take as many FLOPs, of this process.
        seconds: in all.
    """

    rows: int
    is_from_store: bool
    parameters: tuple[str, ...]
    rate: float
    loss_before: float
    loss_after: float
    steps: int
    passes: float
    seconds: float

    @property
    def is_kept(self) -> bool:
        """Whether the head is better than before; else its weights were put back."""
        return self.loss_after < self.loss_before

    def describe(self) -> str:
        """A sentence for the log."""
        if not self.is_kept:
            return (
                f"No head start: {', '.join(self.parameters)} had a loss of {self.loss_before:.4g} before and "
                f"{self.loss_after:.4g} after it (learning rate {self.rate:g}), so that the weights were put back."
            )
        return (
            f"Head start: {', '.join(self.parameters)} trained alone on features of {self.rows} samples"
            f"{' from the feature store' if self.is_from_store else ''}, learning rate {self.rate:g}, loss "
            f"{self.loss_before:.4g} -> {self.loss_after:.4g}, {show_seconds(self.seconds)}."
        )


class HeadStart:
    """Trains the head of a model.

    Args:
        context: model, samples and settings.
        rehearsing: makes a context in which the trainer's own steps run without any update.
        see: is told each batch on which blocks run.
        room: tells the bytes that a temporary file of this process may take.

    Attributes:
        is_due: whether the first epoch gives it, as soon as it is known whether there is a store.
        most: samples of this process, at most, that it takes; None: all.
        leave_out: samples of this process that were held out for a trial.
    """

    def __init__(
        self,
        context: BuildContext,
        rehearsing: Rehearsing,
        see: Callable[[Mapping[str, Any]], None],
        room: Callable[[], int],
    ):
        self.context, self._rehearsing, self._see, self._room = context, rehearsing, see, room
        self.is_due, self.leave_out = False, 0
        self.most: int | None = None
        self._head: Head | None = None
        # What was made for a trial, and is good for more.
        self._done: list[HeadBatch] = []

    @property
    def is_running(self) -> bool:
        """Whether the trainer's step that runs now is one of a head start."""
        return self._head is not None

    @contextlib.contextmanager
    def bypassing(self, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Inside, the model runs its head alone, on the features of a batch; yields its inputs."""
        head, chain = self._head, self.context.chain
        assert head is not None, "called inside `run` only"
        inputs = {name: value for name, value in batch.items() if name not in (FEATURES, OWN_SIZE)}
        features = batch[FEATURES].to(next(iter(head.parameters.values())).device)
        if OWN_SIZE in batch:
            inputs = with_main_input(chain, inputs, batch[OWN_SIZE])
        main_input = chain.input_of_replay(features, inputs)
        inputs[chain.main_input] = main_input
        if OWN_SIZE in batch and not head.fits(tuple(main_input.shape[1:])):  # there are more sizes than it remembers
            head.fit(features, self.context.model_inputs(inputs))
        with head.replay(features, main_input):
            yield inputs

    def run(
        self,
        epochs: int,
        store: FeatureStore | None = None,
        most: int | None = None,
        is_trial: bool = False,
        goes_on: bool = False,
    ) -> HeadStarted | None:
        """Trains the head, if it is new and the model behind it is not.

        Gradients, generators, buffers and the trainer's optimizer are left as they are.

        Args:
            epochs: of the head alone.
            store: whose features take the place of the blocks before its cut; None: these run as well.
            most: samples of this process, at most.
            is_trial: whether it is taken back after a trial.
            goes_on: whether another one on more of the same samples may follow.

        Returns:
            What was done; None if there was nothing to do.

        Raises:
            ChainError: if the model cannot be cut before its head, or its head alone does not answer as the whole.
            RehearsalError: if the trainer's step does not run on features.
            StoreError: if the store cannot be read.
        """
        config, chain = self.context.config, self.context.chain
        if not epochs or is_untrained(chain.model):
            return None
        head = Head(chain, is_new=config.head_start == "new")
        if not head.parameters:
            return None
        began, seed = time.perf_counter(), self.context.source.seed
        shelf = TensorShelf(self.context.cache_dir, _MOST_BYTES, self._room)
        with preserve_rng(), seeded_rng(seed, "head start"), untouched(chain.model), contextlib.closing(shelf):
            self._head = head
            try:
                head.prove(self.context.model_inputs(self.context.source.probe()))
                made = HeadBatches(self.context, head, shelf, self._see)
                batches, rows_run = self._make_batches(made, store, most, is_trial)
                with self._rehearsing(head.parameters.keys()) as step:
                    training = _Training(head, step, self.context, batches, epochs)
                    rate, loss_before, loss_after = training.run(config.head_start_lr)
            except FrozenOutputError as error:
                raise RehearsalError(
                    f"a training step of the head alone fails: {error} head_start_epochs=0 is without a head start."
                ) from error
            finally:
                self._head = None
        self._done = batches if goes_on and not shelf.bytes_in_file and not self.context.source.sizes else []
        # The same on all processes, but for kernels that round otherwise from run to run.
        self.context.group.broadcast_tensors(list(head.parameters.values()))
        before_store = 0.0 if store is None else chain.share(store.manifest.cut)
        # A backward pass takes two forward passes.
        passes = rows_run * (1 - before_store) + training.rows_run * 3 * (1 - head.cut.boundary.flops)
        rows, names = sum(batch.samples for batch in batches), tuple(head.parameters)
        seconds = time.perf_counter() - began
        losses = loss_before, loss_after
        return HeadStarted(rows, store is not None, names, rate, *losses, training.steps, passes, seconds)

    def _make_batches(
        self, made: HeadBatches, store: FeatureStore | None, most: int | None, is_trial: bool
    ) -> tuple[list[HeadBatch], int]:
        """The batches, and how many samples have run for them."""
        rows = made.rows(self.leave_out, most, store)
        known, self._done = ([] if store is not None else self._done), []
        if not is_trial:
            Announcer(self.context.group, logger).warning(
                f"Before the first step, the new head learns alone: {', '.join(made.head.parameters)}. For that "
                f"{sum(map(len, rows))} samples run once through "
                f"{'the blocks behind the cut' if store is not None else 'the model'}; head_start_epochs=0 is without."
            )
        batches = made.make(rows, store, known[: len(rows)])
        if len(batches) < len(rows):
            count, of = sum(batch.samples for batch in batches), sum(map(len, rows))
            Announcer(self.context.group, logger).warning(
                f"The head start takes {count} of {of} samples: what it needs of more fits neither into the "
                f"{show_bytes(_MOST_BYTES)} of memory that it may take nor into a file in {self.context.cache_dir}, "
                f"as {made.shelf.why_full or 'another process has no room'}."
            )
        return batches, sum(batch.samples for batch in batches[len(known) :])


@dataclass
class _Training:
    """Steps of the head alone.

    Args:
        head: what is trained.
        step: runs the trainer's own step.
        context: of the training.
        batches: of the head start, of this process.
        epochs: how often each is trained on.

    Attributes:
        steps: optimizer steps so far.
        rows_run: samples of these steps, and of losses.
    """

    head: Head
    step: Step
    context: BuildContext
    batches: list[HeadBatch]
    epochs: int
    steps: int = 0
    rows_run: int = 0

    def run(self, rate: float | None) -> tuple[float, float, float]:
        """Trains the head, and puts its weights back if it is no better for it, or something fails.

        Args:
            rate: learning rate; None: one is chosen.

        Returns:
            The learning rate, and the loss before and after.
        """
        before = self.weights()
        try:
            loss_before = self.loss()
            rate = self.choose_rate() if rate is None else rate
            self.train(self.batches, rate)
            loss_after = self.loss()
        except BaseException:
            self.put_back(before)
            raise
        if not loss_after < loss_before:
            self.put_back(before)
        return rate, loss_before, loss_after

    def choose_rate(self) -> float:
        """The rate below that with which the loss on held-out batches is the smallest, from the same start.

        A head that is trained less leaves more for the blocks to learn: with DeiT-Tiny on Caltech-101 at 112 px, three
        epochs after a head start at the best rate, 0.01, were a point or two worse than after one at 0.003.
        """
        batches = self.batches[:_SEARCH_BATCHES]
        held_out = max(1, round(len(batches) * _HELD_OUT))
        if len(batches) < 2:
            return RATES[0]
        before, losses = self.weights(), {}
        for rate in RATES:
            self.train(batches[held_out:], rate)
            losses[rate] = self.loss(batches[:held_out])
            self.put_back(before)
        finite = [rate for rate in RATES if math.isfinite(losses[rate])]
        best = min(finite, key=losses.__getitem__) if finite else RATES[0]
        return RATES[max(0, RATES.index(best) - 1)]

    def train(self, batches: Sequence[HeadBatch], rate: float) -> None:
        """Trains the head, the learning rate falling to 0 as a cosine.

        Small steps are lost in weights of half precision: copies in single precision take them.
        """
        masters = {name: _master(parameter) for name, parameter in self.head.parameters.items()}
        optimizer = torch.optim.AdamW(masters.values(), lr=rate, weight_decay=0.0)
        schedule = CosineAnnealingLR(optimizer, T_max=self.epochs * len(batches))
        for epoch in range(self.epochs):
            order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(epoch)).tolist()
            for number in order:
                self._update(self._run(batches[number]), optimizer, masters)
                schedule.step()
                self.steps += 1

    def loss(self, batches: Sequence[HeadBatch] | None = None) -> float:
        """Mean loss over batches of all processes; None: some of those of the head start."""
        batches = self.batches[:_LOSS_BATCHES] if batches is None else batches
        means = self.context.group.gather(sum(float(self._run(batch).loss) for batch in batches) / len(batches))
        return sum(means) / len(means)

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights of the head as they are now."""
        return {name: parameter.detach().clone() for name, parameter in self.head.parameters.items()}

    def put_back(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Overwrites the weights of the head."""
        with torch.no_grad():
            for name, parameter in self.head.parameters.items():
                parameter.copy_(weights[name])

    def _run(self, batch: HeadBatch) -> Outcome:
        self.rows_run += batch.samples
        try:
            return self.context.group.on_all(lambda: self.step(batch.collated))
        except FrozenOutputError:
            raise
        except Exception as error:  # the user's own code may raise anything
            why = f"a training step of the head alone fails with {describe_error(error)}"
            raise RehearsalError(f"{why}: head_start_epochs=0 is without a head start.") from error

    def _update(
        self, outcome: Outcome, optimizer: torch.optim.Optimizer, masters: Mapping[str, torch.nn.Parameter]
    ) -> None:
        parameters = self.head.parameters
        gradients = [
            outcome.gradients.get(name, torch.zeros_like(value)).to(masters[name].dtype)
            for name, value in parameters.items()
        ]
        self.context.group.average_tensors(gradients)
        before = {name: master.grad for name, master in masters.items()}
        for master, gradient in zip(masters.values(), gradients, strict=True):
            master.grad = gradient
        optimizer.step()
        for name, master in masters.items():
            master.grad = before[name]
            if master is not parameters[name]:
                parameters[name].data.copy_(master.data)


def _master(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """The parameter, or a copy of it in single precision where it has less."""
    if not parameter.is_floating_point() or parameter.dtype.itemsize >= 4:
        return parameter
    return torch.nn.Parameter(parameter.detach().float())
