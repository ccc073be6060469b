"""Proof that an optimizer follows the learning rates of blocks: on a copy of it, with some parameters of its own."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..distributed import describe_error
from ..rng import seed_rng, seeded_rng
from .block_steps import BlockSteps, OptimizerError

#: Learning rate of the proof: a user's may be 0 at its beginning.
_RATE = 1e-3
#: Elements of a parameter that is copied, at most, unless its group has no smaller one.
_MOST_ELEMENTS = 2**18
#: Deviation from half of a step at half of the learning rate, relative to the step.
_TOLERANCE = 0.05

#: Steps of the proof; factors are others than 1 in the last one, when averages have parted from what they average.
_STEPS = 3

#: The values of all parameters that are copied.
_Values = list[torch.Tensor]


def prove_optimizer(optimizer: Optimizer, block_of: Callable[[torch.Tensor], int]) -> None:
    """Checks on a copy of an optimizer that its steps follow the learning rates of blocks, and nothing else changes.

    A few steps with random gradients: as they are; with the groups split and all factors 1, which must be the same bit
    for bit; and twice with factors of 0 and 0.5 in the last step, which must not move a block, or half as far. The
    optimizer, its parameters and the random generators stay as they are.

    Args:
        optimizer: not wrapped.
        block_of: the block that owns a parameter.

    Raises:
        OptimizerError: if they do not; the message is the end of a sentence that says why.
    """
    chosen = {id(parameter): parameter for group in optimizer.param_groups for parameter in _choose(group, block_of)}
    if not chosen:
        raise OptimizerError("it holds no parameter that is trained")
    blocks = [block_of(parameter) for parameter in chosen.values()]
    every_other = dict.fromkeys(sorted(set(blocks))[::2])
    before = [parameter.detach().clone() for parameter in chosen.values()]
    mixed = [
        {block: 0.0 if (block in every_other) == is_still else 0.5 for block in blocks} for is_still in (True, False)
    ]
    with seeded_rng("learning rates"):
        try:
            plain = _run(optimizer, chosen, block_of, None)
            split = _run(optimizer, chosen, block_of, dict.fromkeys(blocks, 1.0))
            factored = [(factors, _run(optimizer, chosen, block_of, factors)) for factors in mixed]
        except OptimizerError:
            raise
        except Exception as error:
            raise OptimizerError(f"steps of a copy of it fail ({describe_error(error)})") from error
    if not all(torch.equal(*pair) for pair in zip(before, chosen.values(), strict=True)):
        raise OptimizerError("it cannot be copied: steps of a copy have changed the model")
    for number, block in enumerate(blocks):
        values = [step[number] for step in plain]
        if any(torch.equal(*pair) for pair in pairwise(values)):
            raise OptimizerError("its `step` does not update the parameters that it holds")
        if not torch.equal(values[-1], split[-1][number]):
            raise OptimizerError("its steps depend on which parameters are together in a parameter group")
        step = (values[-1] - values[-2]).double()
        for factors, run in factored:
            moved = (run[-1][number] - values[-2]).double()
            if factors[block] == 0.0 and not torch.equal(run[-1][number], values[-2]):
                raise OptimizerError("it moves parameters whose learning rate is 0")
            if factors[block] and not (moved - step / 2).norm() <= _TOLERANCE * step.norm():
                raise OptimizerError("its steps are not proportional to the learning rate")


def _choose(group: Mapping[str, Any], block_of: Callable[[torch.Tensor], int]) -> list[torch.Tensor]:
    """Of every block in a group its smallest trained vector and its smallest trained matrix."""
    found: dict[tuple[int, bool], torch.Tensor] = {}
    trained = [parameter for parameter in group["params"] if parameter.requires_grad and parameter.numel()]
    trained.sort(key=torch.Tensor.numel)
    for parameter in trained:
        if parameter.numel() <= _MOST_ELEMENTS:
            found.setdefault((block_of(parameter), parameter.ndim > 1), parameter)
    return list(found.values()) or trained[:1]


def _run(
    optimizer: Optimizer,
    chosen: Mapping[int, torch.Tensor],
    block_of: Callable[[torch.Tensor], int],
    factors: Mapping[int, float] | None,
) -> list[_Values]:
    """The steps of a copy.

    Args:
        optimizer: the original.
        chosen: the parameters to copy, by their id.
        block_of: the block that owns a parameter.
        factors: of the learning rates of blocks in the last step; None: the groups are not split.

    Returns:
        Values of the copied parameters before the steps, and after each of them.
    """
    copies = {key: nn.Parameter(torch.zeros_like(parameter)) for key, parameter in chosen.items()}
    blocks = {id(copies[key]): block_of(parameter) for key, parameter in chosen.items()}
    copied, now = _copy(optimizer, copies), dict.fromkeys(blocks.values(), 1.0)
    steps = None
    if factors is not None:
        steps = BlockSteps(copied, lambda parameter: blocks[id(parameter)], lambda block: now[block])
    train = getattr(copied, "train", None)
    if callable(train):
        train()  # as `Trainer` does: optimizers that average weights leave the averages
    rates = [float(group["lr"]) for group in copied.param_groups]
    values = [[parameter.detach().clone() for parameter in copies.values()]]
    for number in range(_STEPS):
        if factors is not None and number == _STEPS - 1:
            now.update(factors)
        seed_rng("learning rates", number)
        for parameter in copies.values():
            parameter.grad = torch.randn(parameter.shape).to(parameter)
        type(copied).step(copied)
        values.append([parameter.detach().clone() for parameter in copies.values()])
    if steps is not None:
        steps.remove()
    if rates != [float(group["lr"]) for group in copied.param_groups]:
        raise OptimizerError("it sets the learning rates of its parameter groups itself")
    return values


def _copy(optimizer: Optimizer, copies: Mapping[int, nn.Parameter]) -> Optimizer:
    """A copy of an optimizer that holds copies of some of its parameters, and none of the others.

    Args:
        optimizer: the original.
        copies: by id of the parameter.
    """
    memo: dict[int, Any] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            memo[id(parameter)] = copies.get(id(parameter), nn.Parameter(torch.empty(0), requires_grad=False))
    groups = []
    for group in optimizer.param_groups:
        rest = {name: copy.deepcopy(value, memo) for name, value in group.items() if name != "params"}
        rate = torch.full_like(group["lr"], _RATE) if isinstance(group["lr"], torch.Tensor) else _RATE
        held = [copies[id(parameter)] for parameter in group["params"] if id(parameter) in copies]
        groups.append({**rest, "params": held, "lr": rate})
        memo[id(group)] = groups[-1]
    memo[id(optimizer.param_groups)] = groups
    state: dict[Any, Any] = defaultdict(dict)
    for key, value in optimizer.state.items():
        if not isinstance(key, torch.Tensor) or id(key) in copies:
            state[memo.get(id(key), key)] = copy.deepcopy(value, memo)
    memo[id(optimizer.state)] = state
    return _copy_object(optimizer, memo)


def _copy_object(optimizer: Optimizer, memo: dict[int, Any]) -> Optimizer:
    """Copies attribute by attribute: `copy.deepcopy` of an optimizer leaves out those that `Optimizer` does not know.

    Hooks and a `step` of the instance, as schedulers put one there, are left out: they lead back to the original.
    """
    copied = object.__new__(type(optimizer))
    memo[id(optimizer)] = copied
    for name, value in vars(optimizer).items():
        if isinstance(value, Optimizer):
            vars(copied)[name] = memo[id(value)] if id(value) in memo else _copy_object(value, memo)
        elif name.startswith("_optimizer_") and name.endswith("_hooks"):
            vars(copied)[name] = OrderedDict()
        elif name != "step":
            vars(copied)[name] = copy.deepcopy(value, memo)
    return copied
