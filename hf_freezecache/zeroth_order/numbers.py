"""Sources of the numbers of perturbations: fresh ones, a pool that is read on and on, rotated shift registers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ..rng import hash_key
from .lfsr import RotatedLFSRs, check_bits, cycle

Distribution = Literal["gaussian", "uniform"]
#: Most numbers that are in memory at a time.
PIECE = 2**20
#: Types of accelerators without double precision.
_WITHOUT_DOUBLE = {"mps"}


@dataclass(frozen=True)
class Piece:
    """A part of the numbers of a perturbation.

    Args:
        perturbation: its number in the training.
        position: of the first number in the perturbation, all parameters one after the other.
        length: how many numbers.
    """

    perturbation: int
    position: int
    length: int


class Numbers(ABC):
    """Numbers that depend on the seed and the piece alone, so that they are given again whenever they are asked for.

    No global generator is touched.

    Attributes:
        drawn: numbers that a generator has given so far, those given again included.
    """

    drawn: int = 0

    @abstractmethod
    def take(self, piece: Piece, device: torch.device) -> torch.Tensor:
        """The numbers of a piece.

        Returns:
            float32 tensor `(piece.length,)`, not to be changed: others may be given the same memory.
        """

    def take_each(self, pieces: Sequence[Piece], device: torch.device) -> list[torch.Tensor]:
        """The numbers of each of several pieces of a perturbation, as `take` gives them."""
        return [self.take(piece, device) for piece in pieces]

    def squares(self, pieces: Sequence[Piece], device: torch.device) -> float:
        """The sum of the squares of the numbers of pieces of a perturbation."""
        return sum(float(as_double(self.take(piece, device)).square().sum()) for piece in pieces)


class FreshNumbers(Numbers):
    """A number of its own for every place of every perturbation, from a generator that is seeded for each piece.

    Args:
        distribution: gaussian (variance 1), or uniform between -1 and 1.
        seed: of the training.
    """

    def __init__(self, distribution: Distribution, seed: int):
        self.distribution, self.seed = distribution, seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def take(self, piece: Piece, device: torch.device) -> torch.Tensor:
        """Draws the numbers of a piece; other kinds of devices have other generators, and give other numbers."""
        self.drawn += piece.length
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        generator = self._generators[device]
        generator.manual_seed(hash_key("perturbation", self.seed, piece.perturbation, piece.position) >> 1)
        if self.distribution == "gaussian":
            return torch.randn(piece.length, generator=generator, device=device)
        return torch.rand(piece.length, generator=generator, device=device).mul_(2).sub_(1)


class Stream(Numbers):
    """Numbers that repeat after a while; every perturbation goes on where the one before it has ended.

    Where the length of a perturbation and the period have a common factor, a few numbers are left out between two
    perturbations: else they would begin at few places of the period, at one alone if it divides the length.

    Args:
        length: numbers of a perturbation.
        period: numbers until they repeat.
    """

    def __init__(self, length: int, period: int):
        self.period = period
        self._long: dict[torch.device, torch.Tensor] = {}
        self.stride = next(stride for stride in range(length, length + period + 1) if math.gcd(stride, period) == 1)

    def start(self, piece: Piece) -> int:
        """Where in the period a piece begins."""
        return (piece.perturbation * self.stride + piece.position) % self.period

    def squares(self, pieces: Sequence[Piece], device: torch.device) -> float:
        """The sum of the squares of the numbers of pieces, from sums that were made with the numbers."""
        return sum(self._squares(_joined(neighbours)) for neighbours in _runs(pieces))

    def _read(self, period: Callable[[], torch.Tensor], piece: Piece, device: torch.device) -> torch.Tensor:
        """The numbers of a piece as a view of those of a period, which are kept several times in a row."""
        start, long = self.start(piece), self._long.get(device)
        if long is None or start + piece.length > len(long):
            times = -(-(self.period + piece.length) // self.period)
            long = self._long[device] = period().to(device).repeat(times)
        return long[start : start + piece.length]

    @abstractmethod
    def _squares(self, piece: Piece) -> float:
        """The sum of the squares of the numbers of a piece."""


class Pool(Stream):
    """A pool of numbers that is drawn once.

    Args:
        length: numbers of a perturbation.
        size: numbers in the pool.
        bits: of a number; they are uniform between -1 and 1.
        seed: of the training.

    Raises:
        ValueError: if there are no such numbers.
    """

    def __init__(self, length: int, size: int, bits: int, seed: int):
        check_bits(bits)
        if size < 2:
            raise ValueError(f"a pool of {size} numbers: give it 2 at least.")
        super().__init__(length, size)
        generator = torch.Generator()
        generator.manual_seed(hash_key("pool", seed) >> 1)
        self.values = as_fractions(torch.randint(1, 2**bits, (size,), generator=generator), bits)
        self.drawn = size
        self._sums = np.concatenate([[0.0], np.cumsum(self.values.double().square().numpy())])

    def take(self, piece: Piece, device: torch.device) -> torch.Tensor:
        """The numbers of a piece of the pool; nothing is drawn."""
        return self._read(lambda: self.values, piece, device)

    def _squares(self, piece: Piece) -> float:
        return _cyclic_sum(self._sums, self.start(piece), piece.length)


class OnTheFly(Stream):
    """Numbers of a row of rotated shift registers.

    Args:
        length: numbers of a perturbation.
        registers: how many there are.
        bits: width of a register, and of a number; they are uniform between -1 and 1.
        seed: of the training.

    Raises:
        ValueError: if there are no such registers.
    """

    def __init__(self, length: int, registers: int, bits: int, seed: int):
        self.row, self.bits = RotatedLFSRs(bits, registers, seed), bits
        super().__init__(length, self.row.period)
        # So few that keeping them takes no more than an eighth of the memory of the weights.
        self._is_kept = self.period <= min(PIECE, length // 8)
        self._fractions: dict[torch.device, torch.Tensor] = {}
        # All registers give one number a clock cycle, in whatever order.
        each = as_fractions(torch.from_numpy(cycle(bits)), bits).double().square().numpy()
        clocks = sum(np.roll(each, -start) for start in self.row.starts)
        self._sums = np.concatenate([[0.0], np.cumsum(clocks)])

    def take(self, piece: Piece, device: torch.device) -> torch.Tensor:
        """The numbers that the registers give in the clock cycles of a piece."""
        self.drawn += piece.length  # by the registers, in whatever way they are looked up here
        if self._is_kept:
            return self._read(lambda: self._at(0, self.period, device), piece, device)
        return self._at(self.start(piece), piece.length, device)

    def take_each(self, pieces: Sequence[Piece], device: torch.device) -> list[torch.Tensor]:
        """The numbers of each of several pieces of a perturbation; those of neighbours are looked up at once."""
        if self._is_kept:
            return super().take_each(pieces, device)
        return [
            numbers
            for neighbours in _runs(pieces)
            for numbers in self.take(_joined(neighbours), device).split([piece.length for piece in neighbours])
        ]

    def _squares(self, piece: Piece) -> float:
        start, count = self.start(piece), self.row.count
        first, last = -(-start // count), (start + piece.length) // count  # whole clock cycles
        if last <= first:
            return self._squares_of(start, piece.length)
        inner = _cyclic_sum(self._sums, first % self.row.cycle_length, last - first)
        before, after = first * count - start, start + piece.length - last * count
        return self._squares_of(start, before) + inner + self._squares_of(last * count, after)

    def _squares_of(self, position: int, length: int) -> float:
        return float(self._at(position, length, torch.device("cpu")).double().square().sum())

    def _at(self, position: int, length: int, device: torch.device) -> torch.Tensor:
        if device not in self._fractions:
            self._fractions[device] = as_fractions(torch.from_numpy(cycle(self.bits)), self.bits).repeat(2).to(device)
        return self._fractions[device].index_select(0, self.row.places(position, length, device))


def as_double(values: torch.Tensor) -> torch.Tensor:
    """In double precision, on the CPU where an accelerator has none."""
    return (values.cpu() if values.device.type in _WITHOUT_DOUBLE else values).double()


def as_fractions(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers from 1 to `2**bits - 1` as numbers between -1 and 1, around 0, with a fixed point."""
    half = 2 ** (bits - 1)
    return (values - half).float().div_(half)


def _runs(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Pieces of a perturbation that follow one another without a gap."""
    run: list[Piece] = []
    for piece in pieces:
        if run and run[-1].position + run[-1].length != piece.position:
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def _joined(run: Sequence[Piece]) -> Piece:
    return Piece(run[0].perturbation, run[0].position, sum(piece.length for piece in run))


def _cyclic_sum(sums: np.ndarray, start: int, length: int) -> float:
    """The sum of `length` values of a cycle from `start` on, of which the sums of the first 0, 1, ... are known."""
    rounds, end = divmod(start + length, len(sums) - 1)
    return float(rounds * sums[-1] + sums[end] - sums[start])
