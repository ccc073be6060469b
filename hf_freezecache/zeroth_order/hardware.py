"""What random numbers for zeroth-order training would cost in programmable hardware (FPGA): ESTIMATES, not syntheses.

Every design gives `lanes` numbers a clock cycle. Building blocks, and where their sizes are from:

- **Box-Muller**: A. Alimohammad, S. F. Fard, B. F. Cockburn, C. Schlegel, "A Compact and Accurate Gaussian Variate
  Generator", IEEE Trans. VLSI 2008: 534 slices, 2 block RAMs and 3 multipliers of a Virtex-II for two 16-bit numbers
  a clock cycle. For comparison D.-U. Lee, J. D. Villasenor, W. Luk, P. H. W. Leong, "A Hardware Gaussian Noise
  Generator Using the Box-Muller Method and Its Error Analysis", IEEE Trans. Computers 55(6), 2006: 1,452 slices, 3
  block RAMs and 12 DSP slices of a Virtex-4, also two 16-bit numbers. A slice of these families has two look-up tables
  and two flip-flops; as the papers give slices only, both are counted as fully used, which is an upper limit.
- **Sum of uniform numbers** (central limit theorem): four registers of 31 bits and the tree of adders that sums their
  lowest bits, as H. Forstén describes it ("Generating normally distributed pseudorandom numbers on a FPGA",
  hforsten.com). An adder takes a look-up table and a flip-flop for each bit of its result.
- **Shift register** (LFSR): a flip-flop for each bit, and one look-up table for the feedback, whose taps here are at
  most four (P. Alfke, Xilinx application note XAPP 052, 1996). One that stands alone in its lane has 31 bits, so that
  its numbers do not repeat within a step.
- **Pool**: numbers in block RAMs of 36 kbit, each of which gives 72 bits a clock cycle at most (AMD, UG473, "7 Series
  FPGAs Memory Resources", simple dual port); they are read `lanes` numbers at a time. A counter for the address, and
  a rotation of the lanes, as the size of the pool is no multiple of them: a look-up table chooses one of four bits,
  for two of the `log2(lanes)` stages. Pool and rotation are this package's design: the paper's is not public.
- **Rotated registers**: every register takes the next state of its neighbour, which is wiring; so they cost what as
  many short registers cost.
- **Scaling** by a power of two: a shift by one of eight distances, three stages of two-way choices a bit. Exact
  scaling: a multiplier a lane. Gaussian numbers need none.

Power is not estimated. The paper's own totals for its accelerator are beside the estimates: `PUBLISHED`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

#: What PeZO's authors report for their accelerator (arXiv 2504.20314, abstract), relative to Gaussian numbers.
PUBLISHED = {"look_up_tables": -0.486, "flip_flops": -0.127, "power_at_most": -0.86}
#: Bits of a number of the published Gaussian generators, how many are summed, bits of a register that stands alone.
_GAUSSIAN_BITS, _SUMMED, _LONG_REGISTER = 16, 4, 31
_BLOCK_RAM_BITS = 36 * 1024
#: Bits that a block RAM gives in a clock cycle, as a memory that is written and read at different ports.
_BLOCK_RAM_WIDTH = 72
#: Stages of a shift by one of eight distances.
_SHIFT_STAGES = 3


@dataclass(frozen=True)
class Cost:
    """An estimate of a generator.

    Args:
        name: of the design.
        bits: of a number.
        numbers: that it draws in a training step; those that are read from a memory do not count.
        look_up_tables, flip_flops, block_rams, multipliers: its size.
        cycles: clock cycles in which a step's numbers are given.
    """

    name: str
    bits: int
    numbers: int
    look_up_tables: int
    flip_flops: int
    block_rams: int
    multipliers: int
    cycles: int

    @property
    def drawn_bits(self) -> int:
        """Random bits that are drawn in a step."""
        return self.numbers * self.bits


@dataclass(frozen=True)
class HardwareCosts:
    """The designs side by side.

    Args:
        parameters: that are trained.
        lanes: numbers a clock cycle.
        uses: how often a number of a direction is needed in a step.
        costs: of the designs.
    """

    parameters: int
    lanes: int
    uses: int
    costs: tuple[Cost, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        rows = [{**asdict(cost), "drawn_bits": cost.drawn_bits} for cost in self.costs]
        about = {"parameters": self.parameters, "lanes": self.lanes, "uses": self.uses}
        return {**about, "are_estimates": True, "designs": rows, "published_by_pezo": PUBLISHED}

    def __str__(self) -> str:
        header = ("design", "bits", "drawn a step", "bits drawn", "LUTs", "FFs", "block RAMs", "multipliers", "cycles")
        rows = [header] + [
            (
                cost.name,
                *(
                    f"{value:,}"
                    for value in (
                        cost.bits,
                        cost.numbers,
                        cost.drawn_bits,
                        cost.look_up_tables,
                        cost.flip_flops,
                        cost.block_rams,
                        cost.multipliers,
                        cost.cycles,
                    )
                ),
            )
            for cost in self.costs
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        first = f"{self.parameters:,} weights, {self.lanes} numbers a clock cycle, each needed {self.uses} times."
        published = (
            f"PeZO's authors report for their accelerator: LUTs {PUBLISHED['look_up_tables']:+.1%}, FFs "
            f"{PUBLISHED['flip_flops']:+.1%}, power up to {PUBLISHED['power_at_most']:+.0%} (arXiv 2504.20314)."
        )
        return "\n".join([f"{first} Estimates from published building blocks, not syntheses.", *lines, published])


def estimate_costs(
    parameters: int,
    lanes: int = 8,
    bits: int = 8,
    pool_size: int = 4095,
    estimator: Literal["two_point", "one_sided"] = "two_point",
    estimates: int = 1,
    exact_scaling: bool = False,
) -> HardwareCosts:
    """Estimates what the numbers of a training step cost in hardware.

    Args:
        parameters: that are trained.
        lanes: numbers that are needed in a clock cycle; of rotated registers as many stand side by side.
        bits: of a uniform number, and of a register.
        pool_size: numbers in the pool.
        estimator, estimates: as in `ZeroOrderConfig`.
        exact_scaling: uniform numbers are multiplied, not shifted.

    Raises:
        ValueError: if a number is not possible; the message names it.
    """
    given = {"parameters": parameters, "lanes": lanes, "bits": bits, "pool_size": pool_size, "estimates": estimates}
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"{name}={value}: give 1 at least.")
    uses = uses_of_a_number(estimator, estimates)
    drawn = parameters * uses
    cycles = -(-parameters // lanes) * uses
    scaled = {"look_up_tables": 0, "multipliers": lanes} if exact_scaling else {"multipliers": 0}
    scaled.setdefault("look_up_tables", lanes * bits * _SHIFT_STAGES)

    def uniform(name: str, numbers: int, tables: int, flip_flops: int, block_rams: int = 0) -> Cost:
        tables += scaled["look_up_tables"]
        return Cost(name, bits, numbers, tables, flip_flops, block_rams, scaled["multipliers"], cycles)

    words = -(-pool_size // lanes)
    address = max(1, math.ceil(math.log2(words)))
    rotation = -(-math.ceil(math.log2(lanes)) // 2) * lanes * bits
    rams = max(math.ceil(pool_size * bits / _BLOCK_RAM_BITS), math.ceil(lanes * bits / _BLOCK_RAM_WIDTH))
    return HardwareCosts(
        parameters,
        lanes,
        uses,
        (
            _box_muller("Gaussian, Box-Muller (Alimohammad 2008)", drawn, lanes, cycles, (534, 2, 3)),
            _box_muller("Gaussian, Box-Muller (Lee 2006)", drawn, lanes, cycles, (1452, 3, 12)),
            _sum_of_uniform(drawn, lanes, cycles),
            uniform("uniform, a long register a lane", drawn, lanes, lanes * max(bits, _LONG_REGISTER)),
            uniform("PeZO pool", 0, address + rotation, address, rams),
            uniform("PeZO on the fly, rotated registers", drawn, lanes, lanes * bits),
        ),
    )


def uses_of_a_number(estimator: Literal["two_point", "one_sided"], estimates: int) -> int:
    """How often a training step needs each number of a direction, over all directions.

    There, to the other side, back, and the update; one-sided: there, back, and the update.
    """
    return estimates * (3 if estimator == "one_sided" else 4)


def _box_muller(name: str, drawn: int, lanes: int, cycles: int, size: tuple[int, int, int]) -> Cost:
    """Generators of two numbers a clock cycle, of so many slices, block RAMs and multipliers."""
    slices, block_rams, multipliers = size
    count = -(-lanes // 2)
    both = 2 * slices * count
    return Cost(name, _GAUSSIAN_BITS, drawn, both, both, block_rams * count, multipliers * count, cycles)


def _sum_of_uniform(drawn: int, lanes: int, cycles: int) -> Cost:
    adders = 2 * (_GAUSSIAN_BITS - 1) + _GAUSSIAN_BITS  # two sums, and their sum
    tables, flip_flops = _SUMMED + adders, _SUMMED * _LONG_REGISTER + adders
    name = "Gaussian, sum of 4 uniform numbers"
    return Cost(name, _GAUSSIAN_BITS, drawn, lanes * tables, lanes * flip_flops, 0, 0, cycles)
