"""The learning rates of a trial are those of the training's first steps, and reading them changes nothing."""

import warnings

import pytest
import torch
from torch.optim.lr_scheduler import (
    ConstantLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from transformers import get_scheduler

from hf_freezecache.training.trial_rates import rates_of_trial

STEPS, MAX_STEPS = 8, 40


def make_optimizer(rate=1.0):
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": rate / 2}]
    return torch.optim.SGD(groups, lr=rate, momentum=0.5)


def transformers_schedule(name, warm_up):
    return lambda optimizer: get_scheduler(name, optimizer, num_warmup_steps=warm_up, num_training_steps=MAX_STEPS)


def one_after_the_other(optimizer):
    parts = [LinearLR(optimizer, 0.25, total_iters=3), MultiStepLR(optimizer, [4]), ConstantLR(optimizer, 0.5)]
    return SequentialLR(optimizer, parts, [3, 20])


SCHEDULES = {
    "constant": transformers_schedule("constant", 0),
    "cosine": transformers_schedule("cosine", 4),
    "long warm-up": transformers_schedule("linear", 20),
    "plateau after a warm-up": transformers_schedule("constant_with_warmup", 20),
    "one cycle": lambda optimizer: OneCycleLR(optimizer, [1.0, 0.5], total_steps=MAX_STEPS),
    "several": one_after_the_other,
}


def rates_of_training(make, count):
    """The rates of the first steps, with all that the schedule sets beside them."""
    optimizer = make_optimizer()
    scheduler = make(optimizer)
    return follow(optimizer, scheduler, count)


def follow(optimizer, scheduler, count):
    seen = []
    for _ in range(count):
        seen.append(
            [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        )
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("name", SCHEDULES)
def test_they_are_read_without_a_trace(name):
    optimizer = make_optimizer()
    scheduler = SCHEDULES[name](optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rates_of_trial(scheduler, optimizer, STEPS, MAX_STEPS)
        assert follow(optimizer, scheduler, 24) == rates_of_training(SCHEDULES[name], 24)


@pytest.mark.parametrize("name", ["constant", "cosine", "several"])
def test_a_trial_that_is_longer_than_the_warm_up_takes_the_first_ones(name):
    optimizer = make_optimizer()
    rates = rates_of_trial(SCHEDULES[name](optimizer), optimizer, STEPS, MAX_STEPS)
    assert rates == [[group["lr"] for group in step] for step in rates_of_training(SCHEDULES[name], STEPS)]


@pytest.mark.parametrize("name", ["long warm-up", "plateau after a warm-up"])
def test_a_shorter_one_goes_through_the_whole_warm_up(name):
    optimizer = make_optimizer()
    rates = rates_of_trial(SCHEDULES[name](optimizer), optimizer, STEPS, MAX_STEPS)
    training = [[group["lr"] for group in step] for step in rates_of_training(SCHEDULES[name], 20)]
    assert rates == [training[number] for number in (2, 4, 7, 9, 12, 14, 17, 19)]


def test_what_does_not_step_by_itself_is_constant():
    optimizer = make_optimizer()
    assert rates_of_trial(ReduceLROnPlateau(optimizer), optimizer, STEPS, MAX_STEPS) == [[1.0, 0.5]] * STEPS


def test_a_rate_that_is_a_tensor_stays_that_tensor():
    rate = torch.tensor(1.0)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=rate, capturable=True)
    scheduler = transformers_schedule("linear", 4)(optimizer)
    held = optimizer.param_groups[0]["lr"]
    rates = rates_of_trial(scheduler, optimizer, STEPS, MAX_STEPS)
    assert rates[:5] == [[0.0], [0.25], [0.5], [0.75], [1.0]]
    assert optimizer.param_groups[0]["lr"] is held and float(held) == 0.0
