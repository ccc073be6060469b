"""The update of a zeroth-order training as an optimizer, which schedules and checkpoints take as any other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .config import ZeroOrderConfig
from .estimates import look_around
from .perturbation import Displacement


class ZeroOrderOptimizer(torch.optim.Optimizer):
    """Moves parameters against directions. It reads no `grad`, and has no state.

    Args:
        params: as any optimizer takes them; `weight_decay` of a group is decoupled.
        lr: the learning rate.
        config: where the numbers of the directions come from.
        seed: of the training.

    Raises:
        ValueError: if a parameter cannot be moved.

    Attributes:
        perturbation: the directions.
        gradients: by direction, how far the next step goes against it; empty after the step.
    """

    def __init__(self, params: Any, lr: float, config: ZeroOrderConfig, seed: int):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})
        self.config = config
        held = [parameter for group in self.param_groups for parameter in group["params"]]
        self.perturbation = config.make_perturbation(held, seed)
        self.gradients: Mapping[int, float] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Moves the parameters that are not frozen; does nothing without an estimate.

        Args:
            closure: as `torch.optim` has it; its loss is returned.
        """
        loss = None if closure is None else closure()
        gradients, self.gradients = self.gradients, {}
        for group in self.param_groups if gradients else ():
            live = [parameter for parameter in group["params"] if parameter.requires_grad]
            self.perturbation.descend(live, gradients, float(group["lr"]), float(group["weight_decay"]))
        return loss


class TrialMoves(ZeroOrderOptimizer):
    """An optimizer that moves its parameters as all losses and the update of a step do, to see how long that takes."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Looks around without a model, and then moves the parameters."""
        nothing = torch.zeros(())
        directions, eps, estimator = range(self.config.estimates), self.config.eps, self.config.estimator
        with Displacement(self.perturbation, self.config.copies(self.perturbation.live)) as displacement:
            look_around(displacement, directions, eps, estimator, lambda: nothing)
        self.gradients = dict.fromkeys(directions, 0.0)
        return super().step(closure)
