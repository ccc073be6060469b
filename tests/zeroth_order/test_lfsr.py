"""Shift registers are of maximal length, bit for bit those of SciPy, and in a row those of a slow model."""

from collections import deque

import numpy as np
import pytest
import torch
from scipy.signal import max_len_seq

from hf_freezecache.zeroth_order.lfsr import LFSR, TAPS, RotatedLFSRs, cycle

WIDTHS = range(4, 17)


class SlowRegister:
    """A register as a list of bits, bit 0 first."""

    def __init__(self, bits: int, seed: int):
        self.taps, self.bits = TAPS[bits], [int(digit) for digit in reversed(f"{seed:0{bits}b}")]

    def next(self) -> int:
        shifted_in = (self.bits[0] + sum(self.bits[tap] for tap in self.taps)) % 2
        self.bits = [*self.bits[1:], shifted_in]
        return int("".join(map(str, reversed(self.bits))), 2)


def slow_row(bits: int, row: RotatedLFSRs, clocks: int) -> list[int]:
    """The numbers of a row of registers that are clocked and moved one by one."""
    seeds = [int(cycle(bits)[start - 1]) for start in row.starts]
    registers = deque(SlowRegister(bits, seed) for seed in seeds)
    found = []
    for _ in range(clocks):
        found += [register.next() for register in registers]
        registers.append(registers.popleft())
    return found


@pytest.mark.parametrize("bits", WIDTHS)
def test_register_goes_through_every_number_but_zero(bits):
    register = LFSR(bits, 5)
    numbers = [register.next() for _ in range(2**bits - 1)]
    assert sorted(numbers) == list(range(1, 2**bits))
    assert register.state == 5 and register.next() == numbers[0]


@pytest.mark.parametrize("bits", WIDTHS)
def test_register_is_bit_for_bit_that_of_scipy(bits):
    seed = 2**bits - 3
    expected, _ = max_len_seq(bits, state=[seed >> place & 1 for place in range(bits)])
    register = LFSR(bits, seed)
    assert [seed & 1, *(register.next() & 1 for _ in range(2**bits - 2))] == expected.tolist()


@pytest.mark.parametrize("bits", WIDTHS)
def test_register_is_bit_for_bit_the_slow_model(bits):
    seed = 2 ** (bits - 1) + 3
    fast, slow = LFSR(bits, seed), SlowRegister(bits, seed)
    assert [fast.next() for _ in range(2000)] == [slow.next() for _ in range(2000)]


@pytest.mark.parametrize("seed", [0, -1, 15, 16, 10**12])
def test_no_seed_stops_the_register(seed):
    register = LFSR(4, seed)
    assert len({register.next() for _ in range(15)}) == 15


@pytest.mark.parametrize("bits", [3, 17, 0])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match="4 to 16 bits"):
        LFSR(bits, 1)


@pytest.mark.parametrize(("bits", "count"), [(4, 1), (4, 7), (5, 8), (8, 3), (8, 8), (11, 32), (16, 5)])
def test_row_is_bit_for_bit_the_slow_model(bits, count):
    row = RotatedLFSRs(bits, count, seed=7)
    expected = slow_row(bits, row, 300)
    assert row.numbers(0, len(expected)).tolist() == expected
    assert row.numbers(count + 1, 2 * count + 1).tolist() == expected[count + 1 : 3 * count + 2]


@pytest.mark.parametrize(("bits", "count"), [(4, 6), (5, 8), (6, 5)])
def test_row_repeats_after_its_period_and_not_before(bits, count):
    row = RotatedLFSRs(bits, count, seed=1)
    numbers = row.numbers(0, row.period)
    assert torch.equal(row.numbers(row.period, row.period), numbers)
    assert torch.equal(row.numbers(row.period - 1, 2), torch.stack([numbers[-1], numbers[0]]))
    shorter = [shift for shift in range(count, row.period, count) if torch.equal(numbers.roll(-shift), numbers)]
    assert shorter == []


def test_registers_of_a_row_begin_at_different_places_and_depend_on_the_seed():
    one, other = RotatedLFSRs(8, 200, seed=1), RotatedLFSRs(8, 200, seed=2)
    assert len(set(one.starts)) == 200
    assert not np.array_equal(one.starts, other.starts)
    assert np.array_equal(one.starts, RotatedLFSRs(8, 200, seed=1).starts)


@pytest.mark.parametrize("count", [0, 16])
def test_impossible_numbers_of_registers_are_refused(count):
    with pytest.raises(ValueError, match="from 1 to 15"):
        RotatedLFSRs(4, count, seed=0)
