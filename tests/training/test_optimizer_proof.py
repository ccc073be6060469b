"""Optimizers that follow the learning rates of blocks, and those that do not."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Adafactor

from hf_freezecache.rng import RngState
from hf_freezecache.training.block_steps import OptimizerError
from hf_freezecache.training.optimizer_proof import prove_optimizer

FOLLOWING = {
    "adamw": lambda groups: torch.optim.AdamW(groups),
    "adamw, fused": lambda groups: torch.optim.AdamW(groups, fused=True),
    "adamw, one by one": lambda groups: torch.optim.AdamW(groups, foreach=False, amsgrad=True),
    "adamw, rate of 0": lambda groups: torch.optim.AdamW(groups, lr=0.0),
    "adamw, rate in a tensor": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(0.1)),
    "nadam": lambda groups: torch.optim.NAdam(groups),
    "radam": lambda groups: torch.optim.RAdam(groups),
    "adamax": lambda groups: torch.optim.Adamax(groups),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, momentum=0.9, centered=True),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr_decay=0.1),
    "adadelta": lambda groups: torch.optim.Adadelta(groups),
    "adafactor": lambda groups: Adafactor(groups, lr=1e-3, relative_step=False, scale_parameter=False),
}


class Averages(torch.optim.SGD):
    """Moves parameters to the average of their past, whatever the learning rate."""

    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.detach(), 0.5)
                parameter.data.lerp_(average, 0.1)


class Notes(torch.optim.SGD):
    """Keeps in a group what depends on its learning rate."""

    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            group["noted"] = group["lr"]


class Together(torch.optim.SGD):
    """Clips the gradients of a group together."""

    def step(self, closure=None):
        for group in self.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        super().step()


class Squares(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data -= group["lr"] ** 2 * parameter.grad


class SetsItsRate(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            group["lr"] = group["lr"] * 0.9


class Around(torch.optim.Optimizer):
    """A wrapper with groups of its own: the optimizer in it keeps its own list."""

    def __init__(self, groups):
        self.inner = torch.optim.SGD(groups, lr=0.1)
        super().__init__([dict(group) for group in self.inner.param_groups], {"lr": 0.1})

    def step(self, closure=None):
        for parameter, copied in zip(self._all(self), self._all(self.inner), strict=True):
            copied.grad = parameter.grad
        self.inner.step()

    @staticmethod
    def _all(optimizer):
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class Sharing(torch.optim.Optimizer):
    """A wrapper that shares its groups with the optimizer in it, as Lookahead and SAM do."""

    def __init__(self, groups):
        self.inner = torch.optim.SGD(groups, lr=0.1)
        super().__init__(self.inner.param_groups, {"lr": 0.1})
        self.inner.param_groups = self.param_groups

    def step(self, closure=None):
        self.inner.step()


class OfTheOriginal(torch.optim.SGD):
    """Leads back to the original through a function, which is not copied."""

    def __init__(self, groups):
        super().__init__(groups, lr=0.1)
        self.move = lambda: [p.data.add_(1.0) for group in self.param_groups for p in group["params"]]

    def step(self, closure=None):
        super().step()
        self.move()


DEVIATING = {
    "holds no parameter": lambda groups: torch.optim.SGD([nn.Parameter(torch.ones(2), requires_grad=False)]),
    "moves parameters whose learning rate is 0": lambda groups: Averages(groups, lr=0.1),
    "depend on which parameters are together": lambda groups: Together(groups, lr=0.1),
    "makes 'noted' of a parameter group depend": lambda groups: Notes(groups, lr=0.1),
    "not proportional": lambda groups: Squares(groups, lr=0.1),
    "sets the learning rates": lambda groups: SetsItsRate(groups, lr=0.1),
    "steps of a copy have changed the model": OfTheOriginal,
    "steps of a copy of it fail": lambda groups: torch.optim.LBFGS([p for group in groups for p in group["params"]]),
}
#: Known ones, for whatever reason.
REFUSED = {
    "rprop": lambda groups: torch.optim.Rprop(groups),
    "asgd": lambda groups: torch.optim.ASGD(groups),
    "adafactor, steps of its own": lambda groups: Adafactor(groups, relative_step=True, scale_parameter=True),
    "groups of its own": Around,
}


def groups_of(model):
    named = dict(model.named_parameters())
    return [
        {"params": [p for p in named.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0},
    ]


def prove(make, dtype=torch.float32):
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)).to(dtype)
    optimizer = make(groups_of(model))
    blocks = {parameter: number for number, layer in enumerate(model) for parameter in layer.parameters()}
    prove_optimizer(optimizer, lambda parameter: blocks.get(parameter, 9))
    return model, optimizer


@pytest.mark.parametrize("name", FOLLOWING)
def test_optimizers_that_follow(name):
    prove(FOLLOWING[name])


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_weights_of_half_precision(name):
    prove(FOLLOWING[name], torch.bfloat16)


def test_wrappers_that_share_their_groups_follow():
    prove(Sharing)


@pytest.mark.parametrize("why", DEVIATING)
def test_optimizers_that_do_not_follow_are_refused_with_the_reason(why):
    with pytest.raises(OptimizerError, match=why):
        prove(DEVIATING[why])


@pytest.mark.parametrize("name", REFUSED)
def test_known_optimizers_that_do_not_follow(name):
    with pytest.raises(OptimizerError):
        prove(REFUSED[name])


def test_nothing_is_left_of_a_proof():
    """The step of an optimizer that has a scheduler leads back to the original; half of the moments are known."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    LambdaLR(optimizer, lambda step: 1.0)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    model[1].requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, gradients = optimizer.state_dict(), [parameter.grad.clone() for parameter in model.parameters()]
    state = {
        number: {name: value.clone() for name, value in entry.items()} for number, entry in state["state"].items()
    }
    generators = RngState()
    prove_optimizer(optimizer, lambda parameter: 0)
    assert generators.is_current()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, model.parameters(), strict=True))
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(state[i][name], after[i][name]) for i in state for name in state[i])
    assert not optimizer._optimizer_step_pre_hooks
