"""Linear-feedback shift registers: the random number generators of small hardware, bit for bit."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch

from ..rng import hash_key

#: By width in bits: the bits that are added (modulo 2) to bit 0 and shifted in from the left. They make the sequence
#: of maximal length, and are those of `scipy.signal.max_len_seq`.
TAPS = {
    4: (3,),
    5: (3,),
    6: (5,),
    7: (6,),
    8: (7, 6, 1),
    9: (5,),
    10: (7,),
    11: (9,),
    12: (11, 10, 4),
    13: (12, 11, 8),
    14: (13, 12, 2),
    15: (14,),
    16: (15, 13, 4),
}


def check_bits(bits: int) -> None:
    """Checks the width of a register.

    Raises:
        ValueError: if no register has it.
    """
    if bits not in TAPS:
        raise ValueError(f"a register of {bits!r} bits is not available: choose from {min(TAPS)} to {max(TAPS)} bits.")


class LFSR:
    """A Fibonacci register of maximal length: it goes through every number but 0 before it repeats.

    Args:
        bits: width, 4 to 16.
        seed: the register before the first clock cycle, if it is from 1 to `2**bits - 1`; others count modulo the
            period, so that no seed stops the register.

    Raises:
        ValueError: if there is no such width.

    Attributes:
        state: the register.
    """

    def __init__(self, bits: int, seed: int):
        check_bits(bits)
        self.bits = bits
        self.state = (seed - 1) % self.period + 1

    @property
    def period(self) -> int:
        """Clock cycles until the register repeats."""
        return 2**self.bits - 1

    def next(self) -> int:
        """Runs one clock cycle.

        Returns:
            The register after it, from 1 to `2**bits - 1`.
        """
        feedback = self.state & 1
        for tap in TAPS[self.bits]:
            feedback ^= self.state >> tap & 1
        self.state = self.state >> 1 | feedback << (self.bits - 1)
        return self.state


@cache
def cycle(bits: int) -> np.ndarray:
    """The numbers of a register with seed 1, from the first clock cycle on.

    Returns:
        int32 array `(2**bits - 1,)`.
    """
    register = LFSR(bits, 1)
    return np.array([register.next() for _ in range(register.period)], dtype=np.int32)


class RotatedLFSRs:
    """Registers of one width side by side, each of which gives a number a clock cycle.

    After every clock cycle the register that gave the first number moves to the end of the row, so that a place of
    the row gets its numbers from all registers in turn. As all registers go through one cycle, each from its own
    place, the numbers are looked up rather than clocked, from any position on.

    Args:
        bits: width of the registers, 4 to 16.
        count: number of registers, 1 to `2**bits - 1`; no two begin at the same place of the cycle.
        seed: decides where they begin.

    Raises:
        ValueError: if there is no such width, or not as many different registers.

    Attributes:
        starts: places of the registers in the cycle, int64 array `(count,)`: the number of register g in clock cycle
            t is `cycle(bits)[(starts[g] + t) % (2**bits - 1)]`.
    """

    def __init__(self, bits: int, count: int, seed: int):
        check_bits(bits)
        self.bits, self.count, self.cycle_length = bits, count, 2**bits - 1
        if not 1 <= count <= self.cycle_length:
            raise ValueError(
                f"{count} registers of {bits} bits: choose from 1 to {self.cycle_length}, as no two may have the same "
                "numbers in the same clock cycle."
            )
        generator = np.random.default_rng(hash_key("registers", seed))
        self.starts = generator.permutation(self.cycle_length)[:count]
        # Places in the cycle of the numbers of `count` clock cycles, after which the registers are in order again.
        turns = np.arange(count)[:, None]
        self._turn = (self.starts[(turns + np.arange(count)) % count] + turns).flatten() % self.cycle_length
        self._turns: dict[torch.device, torch.Tensor] = {}

    @property
    def period(self) -> int:
        """Numbers until all repeat."""
        return self.count * math.lcm(self.count, self.cycle_length)

    def numbers(self, position: int, length: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Numbers in the order in which the row gives them.

        Args:
            position: of the first one, from 0.
            length: how many.
            device: of the result.

        Returns:
            int32 tensor `(length,)`, values from 1 to `2**bits - 1`.
        """
        values = torch.from_numpy(cycle(self.bits)).repeat(2).to(device)
        return values[self.places(position, length, torch.device(device))]

    def places(self, position: int, length: int, device: torch.device) -> torch.Tensor:
        """Places of these numbers in the cycle, repeated once.

        Args:
            position: of the first one, from 0.
            length: how many.
            device: of the result.

        Returns:
            int32 tensor `(length,)`, values below `2 * (2**bits - 1)`.
        """
        if device not in self._turns:
            self._turns[device] = torch.from_numpy(self._turn).int().to(device)
        first, skipped = divmod(position % self.period, len(self._turn))
        turns = -(-(skipped + length) // len(self._turn))
        begins = torch.arange(first, first + turns, device=device) * self.count % self.cycle_length
        return (begins.int()[:, None] + self._turns[device]).flatten()[skipped : skipped + length]
