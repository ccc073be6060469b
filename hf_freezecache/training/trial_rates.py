"""Learning rates for the steps of a trial, as the schedule of the training gives them to its own first steps."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

#: The learning rate of each parameter group in one step.
Rates = list[float]


def rates_of_trial(scheduler: Any, optimizer: torch.optim.Optimizer, steps: int, max_steps: int) -> list[Rates]:
    """The learning rates of a trial.

    A trial that is as long as the warm-up, or longer, takes those of the first steps of the training, one by one. A
    shorter one goes through the whole warm-up in larger strides: a few of its first steps alone would teach too little
    to compare anything, and the full rate without a warm-up may ruin what the training, with one, would not.

    Args:
        scheduler: of the training, before its first step; it and the rates of the optimizer are left as they are. One
            that is not stepped by itself, or is none of PyTorch's, counts as a constant rate.
        optimizer: whose rates it sets; not wrapped.
        steps: of the trial.
        max_steps: of the training.

    Returns:
        The rates of each step.
    """
    groups = optimizer.param_groups
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        return [[float(group.get("initial_lr", group["lr"])) for group in groups]] * steps
    ahead, warm_up = _first_rates(scheduler, groups, steps, max_steps)
    span = max(warm_up, steps)
    return [ahead[-(-(number + 1) * span // steps) - 1] for number in range(steps)]


def set_rates(optimizer: torch.optim.Optimizer, rates: Rates) -> None:
    """Sets the learning rate of each parameter group; one that is a tensor stays that tensor."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@contextmanager
def settings_kept(groups: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Puts back on leaving all that parameter groups hold beside their parameters.

    Args:
        groups: of an optimizer.
    """
    before = [{name: (value, _cloned(value)) for name, value in group.items() if name != "params"} for group in groups]
    try:
        yield
    finally:
        for group, entries in zip(groups, before, strict=True):
            for name in [name for name in group if name != "params" and name not in entries]:
                del group[name]
            for name, (value, clone) in entries.items():
                group[name] = value.copy_(clone) if isinstance(value, torch.Tensor) else value


def _first_rates(
    scheduler: LRScheduler, groups: Sequence[dict[str, Any]], fewest: int, most: int
) -> tuple[list[Rates], int]:
    """The rates of the first steps: of a number of them, and of as many more as the warm-up lasts; and its length."""
    state, warm_up = copy.deepcopy(scheduler.state_dict()), 0
    rates = [[float(group["lr"]) for group in groups]]
    with settings_kept(groups), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, that the optimizer takes no steps in between
        try:
            while len(rates) < most and (len(rates) < fewest or warm_up == len(rates) - 1):
                scheduler.step()
                rates.append([float(group["lr"]) for group in groups])
                if warm_up == len(rates) - 2 and sum(rates[-1]) > sum(rates[-2]):
                    warm_up += 1
        finally:
            scheduler.load_state_dict(state)
    return rates, warm_up


def _cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
