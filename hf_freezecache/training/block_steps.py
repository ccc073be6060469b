"""Steps of an optimizer in which every block has parameter groups, and so a learning rate, of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

#: Entries of a group that a step must leave alone.
_OURS = ("params", "lr")


class OptimizerError(ValueError):
    """An optimizer does not do what learning rates of blocks need."""


class BlockSteps:
    """Splits the parameter groups of an optimizer by block at the beginning of every step, and joins them at its end.

    Outside of a step the groups are those of the user: schedulers, logs and checkpoints never see others. A step that
    is skipped is none. What a step writes into the parts of a group goes into the group.

    Args:
        optimizer: not wrapped.
        block_of: the block that owns a parameter; any other number for those of no block.
        factor_of: what the learning rate of a block is multiplied by in the step that begins.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        block_of: Callable[[torch.Tensor], int],
        factor_of: Callable[[int], float],
    ):
        self.optimizer, self._block_of, self._factor_of = optimizer, block_of, factor_of
        # The groups of the user with their parts, in a step; and steps in it: of classes that the optimizer's extends.
        self._split_groups: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
        self._depth = 0
        self._handles = [
            optimizer.register_step_pre_hook(self._split),
            optimizer.register_step_post_hook(self._join),
        ]

    def remove(self) -> None:
        """From now on the optimizer steps as without this."""
        self.reset()
        for handle in self._handles:
            handle.remove()

    def reset(self) -> None:
        """Puts the groups of the user back, where a step has broken off."""
        if self._split_groups:
            self.optimizer.param_groups[:] = [group for group, _ in self._split_groups]
        self._split_groups, self._depth = [], 0

    def _split(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        self._split_groups = [(group, self._split_group(group)) for group in optimizer.param_groups]
        optimizer.param_groups[:] = [part for _, parts in self._split_groups for part in parts]

    def _split_group(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        members: dict[int, list[torch.Tensor]] = {}
        for parameter in group["params"]:
            members.setdefault(self._block_of(parameter), []).append(parameter)
        parts = []
        for block, parameters in members.items():
            factor = self._factor_of(block)
            rate = group["lr"] if factor == 1.0 else group["lr"] * factor
            parts.append({**group, "params": parameters, "lr": rate})
        return parts or [dict(group)]

    def _join(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth -= 1
        if self._depth:
            return
        for group, parts in self._split_groups:
            for name in parts[0].keys() - set(_OURS):
                if not all(name in part and _is_same(part[name], parts[0][name]) for part in parts):
                    raise OptimizerError(f"a step makes '{name}' of a parameter group depend on its learning rate")
                group[name] = parts[0][name]
        self.reset()


def _is_same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first is second or torch.equal(first, second)
    return first is second or bool(first == second)
