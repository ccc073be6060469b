"""Slopes of a loss along directions, from losses at a few places."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from .perturbation import Displacement

Estimator = Literal["two_point", "one_sided"]


def look_around(
    displacement: Displacement,
    directions: Sequence[int],
    eps: float,
    estimator: Estimator,
    run: Callable[[], torch.Tensor],
) -> list[torch.Tensor]:
    """The losses from which the slopes along directions are estimated.

    Args:
        displacement: entered.
        directions: their numbers.
        eps: distance from the weights.
        estimator: where to look.
        run: the loss at the weights as they are.

    Returns:
        two_point: of every direction, ahead and behind. one_sided: at the weights, then ahead in every direction.
    """
    if estimator == "one_sided":
        losses = [run()]
        for direction in directions:
            displacement.move(direction, eps)
            losses.append(run())
        return losses
    losses = []
    for direction in directions:
        for factor in (eps, -eps):
            displacement.move(direction, factor)
            losses.append(run())
    return losses


def mean(values: Sequence[float]) -> float:
    """The mean, also of infinite numbers, whose sum may be none."""
    return sum(values) / len(values)


@dataclass(frozen=True)
class Estimate:
    """What the losses of a step say.

    Args:
        directions: their numbers.
        losses: as `look_around` returned them.
        eps: distance from the weights.
        estimator: where they are from.
    """

    directions: Sequence[int]
    losses: Sequence[float]
    eps: float
    estimator: Estimator

    @property
    def is_finite(self) -> bool:
        """Whether all losses are numbers."""
        return all(map(math.isfinite, self.losses))

    @property
    def ahead(self) -> list[float]:
        """Losses ahead of the weights, by direction."""
        return list(self.losses[1:] if self.estimator == "one_sided" else self.losses[::2])

    @property
    def behind(self) -> list[float]:
        """Losses behind the weights, by direction; for one_sided that at the weights, for each direction."""
        if self.estimator == "one_sided":
            return [self.losses[0]] * len(self.directions)
        return list(self.losses[1::2])

    @property
    def slopes(self) -> list[float]:
        """The projected gradient, by direction."""
        distance = self.eps if self.estimator == "one_sided" else 2 * self.eps
        return [(ahead - behind) / distance for ahead, behind in zip(self.ahead, self.behind, strict=True)]

    @property
    def norm(self) -> float:
        """The root mean square of the slopes: of the gradient's norm, if directions have variance 1."""
        return math.sqrt(mean([slope * slope for slope in self.slopes]))

    def gradients(self, max_norm: float = 0.0) -> dict[int, float]:
        """By direction, how far to go against it, at a learning rate of 1.

        Args:
            max_norm: slopes are made smaller where their root mean square is larger; 0: they are not. Those of
                one_sided are divided by their standard deviation instead.
        """
        if self.estimator == "one_sided":
            deviation = statistics.stdev(self.slopes)
            factor = 1 / deviation if deviation else 0.0
        else:
            factor = min(1.0, max_norm / self.norm) if max_norm and self.norm else 1.0
        slopes = zip(self.directions, self.slopes, strict=True)
        return {direction: factor * slope / len(self.directions) for direction, slope in slopes}
