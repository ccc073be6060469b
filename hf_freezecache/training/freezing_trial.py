"""A trial before the training: a few steps with frozen blocks and with none, and what they do to held-out samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..build.context import BuildContext
from ..build.several_sizes import rows_by_size
from ..cache.rows import RowSource
from ..cache.sized import BySize, parts_of
from ..model.modes import untouched
from ..policies import Trial
from ..rng import preserve_rng, seeded_rng
from .drawn_rows import in_random_order, of_rows
from .rehearsal import Outcome, Rehearsal, Rehearsing, Step
from .trial_rates import Rates, set_rates, settings_kept

#: Steps of a trial as a share of the training, and how many they are at least and at most.
_SHARE, _FEWEST, _MOST = 0.05, 8, 64
#: Held-out batches, at most, for every one that an update takes, and as a share of all.
_HELD_OUT, _SHARE_HELD_OUT = 8, 0.1


@dataclass(frozen=True)
class Plan:
    """What a trial runs, of this process.

    Args:
        steps: optimizer steps with and without frozen blocks.
        held_out: batches that are not trained on, of the first rows of `in_random_order`; by a head start neither.
        training: batches that are, in turn.
        batches_per_step: of these, that an optimizer step takes.
    """

    steps: int
    held_out: RowSource
    training: RowSource
    batches_per_step: int = 1

    @property
    def samples_run(self) -> tuple[int, int]:
        """Samples of the steps of one of the two trainings, and of its held-out batches."""
        return self.steps * self.batches_per_step * self.training.batch_size, len(self.held_out)


@dataclass(frozen=True)
class Updates:
    """How both trainings of a trial update the weights, as the training would.

    Args:
        optimizer: of the training, before its first step.
        rates: of each step, see `rates_of_trial`.
        max_grad_norm: to which gradients are clipped; None or 0: they are not.
    """

    optimizer: torch.optim.Optimizer
    rates: Sequence[Rates]
    max_grad_norm: float | None

    def take(self, number: int, gradients: Mapping[str, torch.Tensor], trained: Mapping[str, nn.Parameter]) -> None:
        """Takes a step, and leaves the gradients in the parameters as they were.

        Args:
            number: of the step.
            gradients: by name of the parameter.
            trained: parameters by name.
        """
        before = {name: parameter.grad for name, parameter in trained.items()}
        for name, parameter in trained.items():
            parameter.grad = gradients[name]
        if self.max_grad_norm:
            nn.utils.clip_grad_norm_(trained.values(), self.max_grad_norm)
        set_rates(self.optimizer, self.rates[number])
        self.optimizer.step()
        for name, parameter in trained.items():
            parameter.grad = before[name]


class FreezingTrial:
    """Compares a training with frozen blocks with one without, by a few steps from the same weights.

    Both take the training's own optimizer, as its first step would find it, the learning rates of its schedule, the
    trainer's own loss, and the same samples in the same order; a step takes as many of them as one of the training.
    Afterwards weights, buffers, optimizer and generators are what they were.

    Args:
        context: model, samples and settings.
        rehearsing: makes a context in which the trainer's own steps run without any update.
        rehearsal: that the trainer's steps are told to be.
        see: is told each batch on which the model runs.
        batches_per_step: that an optimizer step of the training takes, on each process.
    """

    def __init__(
        self,
        context: BuildContext,
        rehearsing: Rehearsing,
        rehearsal: Rehearsal,
        see: Callable[[Mapping[str, Any]], None],
        batches_per_step: int = 1,
    ):
        self._batches_per_step = batches_per_step
        self.context, self._rehearsing, self._rehearsal, self._see = context, rehearsing, rehearsal, see

    def plan(self, max_steps: int) -> Plan | None:
        """What is run for a training of a number of steps; None if that, or the data set, is too short."""
        steps = min(_MOST, round(_SHARE * max_steps))
        source = self.context.source
        main_input = self.context.chain.main_input
        if rows_by_size(source, main_input):
            source = source.collated_by(BySize(source.collator, main_input, source.batch_size))
        mine, size = in_random_order(source, self.context.group), source.batch_size
        batches = len(mine) // size
        per_step = min(self._batches_per_step, max(batches, 1))  # an update ends with the epoch
        held_out = min(_HELD_OUT * per_step, math.floor(_SHARE_HELD_OUT * batches))
        if steps < _FEWEST or not held_out:
            return None
        first = held_out * size
        last = min(first + steps * per_step * size, batches * size)
        return Plan(steps, of_rows(source, mine[:first]), of_rows(source, mine[first:last]), per_step)

    def run(self, cut: int, plan: Plan, updates: Updates) -> Trial:
        """Runs both.

        Args:
            cut: frozen blocks of the one.
            plan: what is run.
            updates: how weights are updated.
        """
        chain, group = self.context.chain, self.context.group
        live = self._losses(plan, updates)
        try:
            chain.freeze(cut)
            frozen = self._losses(plan, updates)
        finally:
            chain.unfreeze()
        samples = sum(group.gather(len(plan.held_out)))
        gathered = zip(*group.gather((frozen, live)), strict=True)
        all_frozen, all_live = ([loss for losses in by_rank for loss in losses] for by_rank in gathered)
        return Trial(cut, plan.steps, samples, all_frozen, all_live)

    def _losses(self, plan: Plan, updates: Updates) -> list[float]:
        """Trains what is trainable now, and puts it back; the losses of the held-out batches in between."""
        model, seed = self.context.chain.model, self.context.source.seed
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        with (
            preserve_rng(),
            untouched(model),
            kept(trained),
            as_at_first(updates.optimizer),
            self._rehearsal.whole(),
        ):
            with seeded_rng(seed, "trial"), self._rehearsing(None) as step:
                for number in range(plan.steps):
                    updates.take(number, self._gradients(step, plan, number, trained), trained)
            with seeded_rng(seed, "held out"), self._rehearsing(()) as step:
                ranges = range(plan.held_out.num_ranges)
                return [float(self._run(step, plan.held_out, [number]).loss) for number in ranges]

    def _gradients(
        self, step: Step, plan: Plan, number: int, trained: Mapping[str, nn.Parameter]
    ) -> dict[str, torch.Tensor]:
        """The gradients of a step of the trial, of all processes."""
        first = number * plan.batches_per_step
        batches = [place % plan.training.num_ranges for place in range(first, first + plan.batches_per_step)]
        found = self._run(step, plan.training, batches).gradients
        # A process whose batch has left a parameter out takes part in its mean, too.
        gradients = {name: found.get(name, torch.zeros_like(value)) for name, value in trained.items()}
        self.context.group.average_tensors(list(gradients.values()))
        return gradients

    def _run(self, step: Step, source: RowSource, numbers: Sequence[int]) -> Outcome:
        def run() -> Outcome:
            collated = [source.collate(source.rows(number)) for number in numbers]
            batches = [max(parts_of(batch), key=_rows_of) for batch in collated]
            for batch in batches:
                self._see(batch)
            return step(*batches)

        return self.context.group.on_all(run)


def _rows_of(batch: Any) -> int:
    tensors = (value for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim)
    return max((len(tensor) for tensor in tensors), default=0)


@contextmanager
def kept(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Puts back the values of parameters on leaving."""
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])


@contextmanager
def as_at_first(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, an optimizer has no state; afterwards its state and its settings are as they were."""
    state = dict(optimizer.state)
    optimizer.state.clear()
    try:
        with settings_kept(optimizer.param_groups):
            yield
    finally:
        optimizer.state.clear()
        optimizer.state.update(state)
