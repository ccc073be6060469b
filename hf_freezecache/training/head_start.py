"""A head start: the head alone is trained on features of the untouched model, before the first step.

A new head sends gradients of no use into pretrained blocks; one that is trained first leaves them as they are (linear
probing, then fine-tuning: Kumar et al. 2022, arXiv 2202.10054, section 4). All that runs before the head runs once, on
each sample as the base view has it.
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

from ..build.context import BuildContext
from ..build.padded_samples import has_widths
from ..model.freshness import is_untrained
from ..model.head import Head
from ..model.modes import untouched
from ..model.stand_ins import FrozenOutputError, stays_real
from ..replay.collator import CODE_PREFIX
from ..rng import preserve_rng, seeded_rng
from ..units import show_seconds
from .drawn_rows import in_random_order, of_rows
from .rehearsal import Outcome, RehearsalError, Rehearsing, Step

#: Learning rates among which one is chosen.
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
#: Memory that features may take; of more samples, as many as fit are drawn.
_MOST_BYTES = 2**30
#: Batches by which a learning rate is chosen, at most, and the share of them that is held out.
_SEARCH_BATCHES, _HELD_OUT = 40, 0.2
#: Batches on which the loss is compared before and after.
_LOSS_BATCHES = 16
#: Name of the only code of a batch of the head start.
_FEATURES = CODE_PREFIX + "head"


@dataclass(frozen=True)
class HeadStarted:
    """What a head start has done.

    Args:
        rows: samples on which the head was trained, of this process.
        parameters: names of what was trained.
        rate: learning rate, chosen or given.
        loss_before, loss_after: mean over some training batches.
        steps: optimizer steps, those of the choice of a learning rate included.
        passes: forward passes of one sample through the whole model that take as many FLOPs, of this process.
        seconds: in all.
    """

    rows: int
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
            f"Head start: {', '.join(self.parameters)} trained alone on features of {self.rows} samples, learning "
            f"rate {self.rate:g}, loss {self.loss_before:.4g} -> {self.loss_after:.4g}, {show_seconds(self.seconds)}."
        )


@dataclass
class _Batch:
    """A collated batch without its main input, unless that is of integers, and the feature of its samples."""

    inputs: dict[str, Any]
    features: torch.Tensor


class HeadStart:
    """Trains the head of a model.

    Args:
        context: model, samples and settings.
        rehearsing: makes a context in which the trainer's own steps run without any update.
        see: is told each batch on which the whole model runs.
    """

    def __init__(self, context: BuildContext, rehearsing: Rehearsing, see: Callable[[Mapping[str, Any]], None]):
        self.context, self._rehearsing, self._see = context, rehearsing, see
        self._head: Head | None = None

    @property
    def is_running(self) -> bool:
        """Whether the trainer's step that runs now is one of a head start."""
        return self._head is not None

    @contextlib.contextmanager
    def bypassing(self, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Inside, the model runs its head alone, on the features of a batch; yields its inputs."""
        assert self._head is not None, "called inside `run` only"
        inputs = {name: value for name, value in batch.items() if name != _FEATURES}
        features = batch[_FEATURES].to(next(iter(self._head.parameters.values())).device)
        main_input = self.context.chain.input_of_replay(features, inputs)
        with self._head.replay(features, main_input):
            yield {**inputs, self.context.chain.main_input: main_input}

    def _has_several_sizes(self) -> bool:
        """Whether samples have no common width, and are no tokens; the same on all processes."""
        chain, source = self.context.chain, self.context.source
        if stays_real(chain.own_trace().probe[chain.main_input]):
            return False
        return self.context.group.on_main(lambda: has_widths(source, chain.main_input))

    def run(self, epochs: int, leave_out: int = 0, most: int | None = None) -> HeadStarted | None:
        """Trains the head, if it is new and the model behind it is not.

        Gradients, generators, buffers and the trainer's optimizer are left as they are.

        Args:
            epochs: of the head alone.
            leave_out: samples of this process that are held out for a trial.
            most: samples of this process, at most.

        Returns:
            What was done; None if there was nothing to do.

        Raises:
            ChainError: if the model cannot be cut before its head.
            RehearsalError: if the trainer's step does not run on features, or samples of several sizes are no tokens.
        """
        config, chain = self.context.config, self.context.chain
        if not epochs or is_untrained(chain.model):
            return None
        head = Head(chain, is_new=config.head_start == "new")
        if not head.parameters:
            return None
        if self._has_several_sizes():
            if not config.head_start_epochs:  # it was the trial's own
                return None
            raise RehearsalError(
                "a head start takes texts, or samples of one size, and these have several: pad or resize them to one, "
                "or head_start_epochs=0 is without a head start."
            )
        began, seed = time.perf_counter(), self.context.source.seed
        with preserve_rng(), seeded_rng(seed, "head start"), untouched(chain.model):
            self._head = head
            try:
                head.prove(self.context.model_inputs(self.context.source.probe()))
                batches = self._make_batches(head, leave_out, most)
                with self._rehearsing(head.parameters.keys()) as step:
                    training = _Training(head, step, self.context, batches, epochs)
                    before, loss_before = training.weights(), training.loss()
                    rate = training.choose_rate() if config.head_start_lr is None else config.head_start_lr
                    training.train(training.batches, rate)
                    loss_after = training.loss()
                    if not loss_after < loss_before:
                        training.put_back(before)
            except FrozenOutputError as error:
                raise RehearsalError(
                    f"a training step of the head alone fails: {error} head_start_epochs=0 is without a head start."
                ) from error
            finally:
                self._head = None
        # The same on all processes, but for kernels that round otherwise from run to run.
        self.context.group.broadcast_tensors(list(head.parameters.values()))
        rows = sum(len(batch.features) for batch in training.batches)
        # A backward pass takes two forward passes.
        passes = rows + training.rows_run * 3 * (1 - head.cut.boundary.flops)
        seconds = time.perf_counter() - began
        names = tuple(head.parameters)
        return HeadStarted(rows, names, rate, loss_before, loss_after, training.steps, passes, seconds)

    def _make_batches(self, head: Head, leave_out: int, most: int | None) -> list[_Batch]:
        """Runs all that is before the head, on samples of this process in random order, but for the first ones."""
        context, source, group = self.context, self.context.source, self.context.group
        fit = max(1, _MOST_BYTES // (4 * math.prod(head.cut.layout.shape)))
        drawn_rows = of_rows(source, in_random_order(source, group)[leave_out:][:fit][:most])

        def make() -> list[_Batch]:
            batches = []
            for _, (drawn, *_views) in drawn_rows.loader(range(drawn_rows.num_ranges)):
                self._see(drawn.batch)
                features = head.features(context.model_inputs(drawn.batch)).cpu()
                main = context.chain.main_input
                kept = {name: value for name, value in drawn.batch.items() if name != main or stays_real(value)}
                batches.append(_Batch(kept, features))
            return batches

        return group.on_all(make)


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
    batches: list[_Batch]
    epochs: int
    steps: int = 0
    rows_run: int = 0

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

    def train(self, batches: Sequence[_Batch], rate: float) -> None:
        """Trains the head, the learning rate falling to 0 as a cosine."""
        optimizer = torch.optim.AdamW(self.head.parameters.values(), lr=rate, weight_decay=0.0)
        schedule = CosineAnnealingLR(optimizer, T_max=self.epochs * len(batches))
        for epoch in range(self.epochs):
            order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(epoch)).tolist()
            for number in order:
                self._update(self._run(batches[number]), optimizer)
                schedule.step()
                self.steps += 1

    def loss(self, batches: Sequence[_Batch] | None = None) -> float:
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

    def _run(self, batch: _Batch) -> Outcome:
        self.rows_run += len(batch.features)
        return self.context.group.on_all(lambda: self.step({_FEATURES: batch.features, **batch.inputs}))

    def _update(self, outcome: Outcome, optimizer: torch.optim.Optimizer) -> None:
        parameters = self.head.parameters
        gradients = [outcome.gradients.get(name, torch.zeros_like(value)) for name, value in parameters.items()]
        self.context.group.average_tensors(gradients)
        before = {name: parameter.grad for name, parameter in parameters.items()}
        for parameter, gradient in zip(parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        for name, parameter in parameters.items():
            parameter.grad = before[name]
