"""Perturbations of the weights of a model: in place, given again from their number, without a copy of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from types import TracebackType
from typing import Literal

import torch

from .numbers import PIECE, Numbers, Piece

Scaling = Literal["none", "exact", "power_of_two"]
#: Parts of parameters, and the position of the first number of each in a direction.
Lot = list[tuple[torch.Tensor, int]]


class Perturbation:
    """The directions in which weights are moved: direction k is the same whenever it is asked for.

    Every parameter has its own place in a direction, whichever others are frozen. Frozen ones
    (`requires_grad=False`) are left alone.

    Args:
        parameters: all that may be moved, in an order that does not change.
        numbers: of the directions.
        scaling: exact gives a direction the length that one of as many Gaussian numbers is expected to have;
            power_of_two rounds the factor for that to a power of two, so that hardware shifts bits; none takes the
            numbers as they are.

    Raises:
        ValueError: if a parameter cannot be moved.

    Attributes:
        length: numbers of a direction.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], numbers: Numbers, scaling: Scaling):
        self.numbers, self.scaling = numbers, scaling
        self._parameters = list(parameters)
        for parameter in self._parameters:
            if type(parameter.data) is not torch.Tensor or not parameter.is_floating_point():
                raise ValueError(
                    f"weights of the type {type(parameter.data).__name__}, {parameter.dtype}, cannot be moved by "
                    "small steps: zeroth-order training takes plain tensors of floating-point numbers."
                )
        self._offsets: dict[int, int] = {}
        self.length = 0
        for parameter in self._parameters:
            self._offsets[id(parameter)] = self.length
            self.length += parameter.numel()
        self._scales: dict[tuple[int, tuple[bool, ...]], float] = {}

    @property
    def live(self) -> list[torch.Tensor]:
        """The parameters that are moved now."""
        return [parameter for parameter in self._parameters if parameter.requires_grad]

    @torch.no_grad()
    def add(self, direction: int, factor: float) -> None:
        """Moves the weights along a direction, in place; all of them, or, after an error, none."""
        factor *= self.scale(direction)
        moved: list[Lot] = []
        try:
            for lot in self._lots(self.live):
                torch._foreach_add_([target for target, _ in lot], self._take(lot, direction), alpha=factor)
                moved.append(lot)
        except BaseException:
            for lot in moved:
                torch._foreach_add_([target for target, _ in lot], self._take(lot, direction), alpha=-factor)
            raise

    @torch.no_grad()
    def descend(
        self, parameters: Sequence[torch.Tensor], gradients: Mapping[int, float], rate: float, decay: float
    ) -> None:
        """Moves parameters against directions, and towards zero; they are rounded once.

        Args:
            parameters: of those of the perturbation.
            gradients: the slope of the loss along directions, by their number, as they are summed.
            rate: the learning rate.
            decay: of the weights, decoupled: `rate * decay` of them goes.
        """
        for lot in self._lots(parameters):
            targets, totals = [target for target, _ in lot], self._sum(lot, gradients)
            if decay:
                torch._foreach_add_(totals, targets, alpha=decay)
            torch._foreach_add_(targets, totals, alpha=-rate)

    @torch.no_grad()
    def combine(self, parameter: torch.Tensor, gradients: Mapping[int, float]) -> torch.Tensor:
        """The sum of directions, each times its factor, as a tensor like a parameter."""
        totals = [total for lot in self._lots([parameter]) for total in self._sum(lot, gradients)]
        return torch.cat([total.to(parameter.dtype).flatten() for total in totals]).view(parameter.shape)

    def _sum(self, lot: Lot, gradients: Mapping[int, float]) -> list[torch.Tensor]:
        """The sum of directions, each times its factor, at some parts, float32."""
        totals: list[torch.Tensor] = []
        for direction, gradient in gradients.items():
            factor, numbers = gradient * self.scale(direction), self._take(lot, direction)
            if totals:
                torch._foreach_add_(totals, numbers, alpha=factor)
            else:
                totals = list(torch._foreach_mul(numbers, factor))
        return totals

    def scale(self, direction: int) -> float:
        """What the numbers of a direction are multiplied by."""
        if self.scaling == "none":
            return 1.0
        key = (direction, tuple(parameter.requires_grad for parameter in self._parameters))
        if key not in self._scales:
            if len(self._scales) >= 64:
                self._scales.clear()
            self._scales[key] = self._find_scale(direction)
        return self._scales[key]

    def _find_scale(self, direction: int) -> float:
        parts = [part for parameter in self.live for part in self._parts(parameter)]
        squares = sum(self.numbers.squares(pieces, device) for device, pieces in _by_device(parts, direction))
        count = sum(target.numel() for target, _ in parts)
        if not squares:
            return 1.0  # nothing is moved, or by zeros
        exact = gaussian_modulus(count) / math.sqrt(squares)
        return exact if self.scaling == "exact" else 2.0 ** round(math.log2(exact))

    def _lots(self, parameters: Sequence[torch.Tensor]) -> Iterator[Lot]:
        """Parts of parameters, as many as have `PIECE` numbers together: they are moved at once."""
        lot: Lot = []
        room = PIECE
        for parameter in parameters:
            for target, position in self._parts(parameter):
                if lot and target.numel() > room:
                    yield lot
                    lot, room = [], PIECE
                lot.append((target, position))
                room -= target.numel()
        if lot:
            yield lot

    def _parts(self, parameter: torch.Tensor) -> Lot:
        """Parts of a parameter, as views."""
        offset, values = self._offsets[id(parameter)], parameter.detach()
        if not values.is_contiguous():
            return [(values, offset)]
        flat = values.view(-1)
        return [(flat[start : start + PIECE], offset + start) for start in range(0, len(flat), PIECE)]

    def _take(self, lot: Lot, direction: int) -> list[torch.Tensor]:
        """The numbers of a direction that belong to some parts."""
        numbers = [
            each for device, pieces in _by_device(lot, direction) for each in self.numbers.take_each(pieces, device)
        ]
        return [each.view(target.shape) for each, (target, _) in zip(numbers, lot, strict=True)]


def _by_device(lot: Lot, direction: int) -> Iterator[tuple[torch.device, list[Piece]]]:
    """The pieces that belong to some parts, together where the same device has neighbours."""
    for device, parts in groupby(lot, key=lambda part: part[0].device):
        yield device, [Piece(direction, position, target.numel()) for target, position in parts]


class Displacement:
    """Moves weights along one direction at a time, and puts them back at the end of the context.

    Args:
        perturbation: the directions.
        exact: keep a copy of the weights that are moved, so that they come back bit for bit. Otherwise what was added
            is subtracted, which costs no memory and leaves rounding errors.
    """

    def __init__(self, perturbation: Perturbation, exact: bool):
        self._perturbation, self._exact = perturbation, exact
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._direction, self._factor = 0, 0.0

    def __enter__(self) -> Displacement:
        if self._exact:
            self._kept = [(parameter, parameter.detach().clone()) for parameter in self._perturbation.live]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._exact:
            self._put_back()  # also where moving them has failed half way
        self.move(self._direction, 0.0)
        self._kept = []

    def move(self, direction: int, factor: float) -> None:
        """Puts the weights at `factor` times a direction from where they were at the beginning."""
        if self._factor and (self._exact or direction != self._direction):
            self._put_back()
        if factor != self._factor:
            self._perturbation.add(direction, factor - self._factor)
        self._direction, self._factor = direction, factor

    @torch.no_grad()
    def _put_back(self) -> None:
        if self._exact:
            for parameter, value in self._kept:
                parameter.copy_(value)
        else:
            self._perturbation.add(self._direction, -self._factor)
        self._factor = 0.0


def gaussian_modulus(count: int) -> float:
    """The expected length of a vector of independent Gaussian numbers of variance 1.

    Args:
        count: how many numbers, 1 at least.
    """
    if count > 10_000:  # relative error below 1 / (8 count**2); logarithms of the gamma function would cancel out
        return math.sqrt(count - 0.5)
    return math.sqrt(2) * math.exp(math.lgamma((count + 1) / 2) - math.lgamma(count / 2))
