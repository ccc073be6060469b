"""Groups are split by block inside a step of the optimizer and nowhere else."""

import pytest
import torch
from torch import nn

from hf_freezecache.training.block_steps import BlockSteps, OptimizerError


class Plain(torch.optim.Optimizer):
    """Gradient descent that notes its groups, and counts its steps in them."""

    def __init__(self, groups, lr=1.0, **more):
        super().__init__(groups, dict(lr=lr, steps=0, **more))
        self.seen = []

    def step(self, closure=None):
        self.seen.append([(len(group["params"]), float(group["lr"])) for group in self.param_groups])
        for group in self.param_groups:
            group["steps"] += 1
            for parameter in group["params"]:
                parameter.data -= group["lr"] * parameter.grad


def parameters(count=4):
    made = [nn.Parameter(torch.zeros(2)) for _ in range(count)]
    for parameter in made:
        parameter.grad = torch.ones(2)
    return made


def by_number(made, blocks):
    return lambda parameter: blocks[next(i for i, other in enumerate(made) if other is parameter)]


def split(optimizer, made, blocks=(0, 0, 1, 2), factors=(0.0, 0.5, 1.0)):
    return BlockSteps(optimizer, by_number(made, blocks), lambda block: factors[block])


def test_each_block_has_its_rate_in_a_step_and_the_users_groups_are_back_behind_it():
    made = parameters()
    optimizer = Plain([{"params": made[:3]}, {"params": made[3:], "lr": 3.0}, {"params": []}])
    groups = list(optimizer.param_groups)
    steps = split(optimizer, made)
    optimizer.step()
    assert optimizer.seen == [[(2, 0.0), (1, 0.5), (1, 3.0), (0, 1.0)]]
    assert [float(parameter[0].detach()) for parameter in made] == [0.0, 0.0, -0.5, -3.0]
    assert all(now is before for now, before in zip(optimizer.param_groups, groups, strict=True))
    assert [group["lr"] for group in groups] == [1.0, 3.0, 1.0] and [len(group["params"]) for group in groups] == [
        3,
        1,
        0,
    ]
    assert [group["steps"] for group in groups] == [1, 1, 1]
    steps.remove()
    optimizer.step()
    assert optimizer.seen[-1] == [(3, 1.0), (1, 3.0), (0, 1.0)]


def test_a_rate_that_is_a_tensor_stays_the_same_tensor():
    made, rate = parameters(), torch.tensor(2.0)
    optimizer = Plain([{"params": made}], lr=rate)
    split(optimizer, made)
    optimizer.step()
    assert optimizer.seen == [[(2, 0.0), (1, 1.0), (1, 2.0)]]
    assert optimizer.param_groups[0]["lr"] is rate and float(rate) == 2.0


def test_a_step_that_breaks_off_leaves_nothing_behind():
    made = parameters()
    optimizer = Plain([{"params": made}])
    steps, gradient = split(optimizer, made), made[3].grad
    made[3].grad = None
    with pytest.raises(TypeError):
        optimizer.step()
    made[3].grad = gradient
    steps.reset()
    optimizer.step()
    assert optimizer.seen[0] == optimizer.seen[1] and len(optimizer.param_groups) == 1
    made[3].grad = None
    with pytest.raises(TypeError):
        optimizer.step()
    steps.remove()
    assert len(optimizer.param_groups) == 1


def test_what_differs_between_the_parts_of_a_group_is_an_error():
    class Notes(Plain):
        def step(self, closure=None):
            super().step()
            for group in self.param_groups:
                group["noted"] = group["lr"]

    made = parameters()
    optimizer = Notes([{"params": made}])
    split(optimizer, made)
    with pytest.raises(OptimizerError, match="'noted'"):
        optimizer.step()


def test_steps_of_the_class_that_an_optimizer_extends_are_part_of_its_own():
    class Decays(Plain):
        def step(self, closure=None):
            super().step()
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data -= group["lr"] * 10

    made = parameters()
    Plain([{"params": made}])  # from the first one on, the class calls hooks
    optimizer = Decays([{"params": made}])
    split(optimizer, made)
    optimizer.step()
    assert [float(parameter[0].detach()) for parameter in made] == [0.0, 0.0, -5.5, -11.0]
    assert len(optimizer.param_groups) == 1


def test_steps_that_a_scaler_skips_are_none():
    made = parameters()
    optimizer, scaler = torch.optim.SGD(made, lr=1.0), torch.amp.GradScaler("cpu", init_scale=4.0)
    split(optimizer, made)
    scaler.scale(torch.zeros(1))
    made[0].grad = torch.full((2,), float("inf"))
    scaler.step(optimizer)
    scaler.update()
    assert all(not parameter.any() for parameter in made) and len(optimizer.param_groups) == 1
    for parameter in made:
        parameter.grad = torch.full((2,), scaler.get_scale())
    scaler.step(optimizer)
    assert [float(parameter[0].detach()) for parameter in made] == [0.0, 0.0, -0.5, -1.0]


def test_state_of_an_optimizer_that_was_loaded_goes_on():
    """accelerate and checkpoints load the state, which replaces the groups."""
    made = parameters()
    optimizer = torch.optim.SGD(made, lr=1.0, momentum=0.9)
    split(optimizer, made)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert [round(float(parameter[0].detach()), 6) for parameter in made] == [0.0, 0.0, -1.45, -2.9]
