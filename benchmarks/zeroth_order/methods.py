"""The ways to find a direction of descent that are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_freezecache import ZeroOrderConfig

#: Forward passes that the exact gradient of a batch counts as: one forward, and a backward pass of twice its FLOPs.
PASSES_OF_A_GRADIENT = 3
EPS, OTHER_EPS = 1e-3, 1e-2
#: Learning rates that are tried first, in this order; each is half a decade from the next.
RATES = (3e-5, 1e-5, 1e-4)
#: Learning rates of other kinds of steps: along exact gradients, and of a length that does not depend on the slope.
RATES_OF_GRADIENTS = (3e-2, 1e-2, 1e-1)
RATES_OF_NORMALIZED = (3e-4, 1e-4, 1e-3)
POOLS = (255, 1023, 4095, 4096, 16383, 65535)
WIDTHS = (4, 6, 8, 12, 16)


@dataclass(frozen=True)
class Method:
    """One way to train.

    Args:
        name: in tables and files.
        settings: of `ZeroOrderConfig`, without `eps`; None: exact gradients.
        rates: learning rates that are tried first.
        tuned_as: the method whose learning rate and `eps` it has; "": its own.
    """

    name: str
    settings: Mapping[str, Any] | None = field(hash=False)
    rates: tuple[float, ...] = RATES
    tuned_as: str = ""
    passes: int = field(init=False)

    def __post_init__(self) -> None:
        passes = PASSES_OF_A_GRADIENT if self.settings is None else ZeroOrderConfig(**self.settings).forward_passes
        object.__setattr__(self, "passes", passes)

    @property
    def has_eps(self) -> bool:
        """Whether losses are looked at in some distance."""
        return self.settings is not None

    @property
    def follows_slope(self) -> bool:
        """Whether a step is as long as the loss is steep along a random direction, so that rates are a task's own."""
        return self.settings is not None and self.settings.get("estimator") != "one_sided"


def pool(size: int) -> str:
    """The name of the method with a pool."""
    return f"pool {size}"


def on_the_fly(bits: int) -> str:
    """The name of the method with shift registers."""
    return f"on the fly {bits}"


def make_methods() -> list[Method]:
    """All methods, in the order in which they are trained: where time is short, the last ones are left out."""
    pools = {size: Method(pool(size), {"number_reuse": "pool", "pool_size": size, "number_bits": 8}) for size in POOLS}
    registers = {
        bits: Method(on_the_fly(bits), {"number_reuse": "on_the_fly", "registers": 8, "number_bits": bits})
        for bits in WIDTHS
    }
    uniform = {"distribution": "uniform"}
    first = [
        Method("MeZO", {}),
        Method("exact gradient", None, RATES_OF_GRADIENTS),
        pools.pop(4095),
        registers.pop(8),
        Method("naive uniform", {**uniform, "modulus_scaling": "none"}),
        Method("naive uniform, not tuned", {**uniform, "modulus_scaling": "none"}, tuned_as="MeZO"),
    ]
    last = [
        Method("FZOO-like", {"estimator": "one_sided", "estimates": 3}, RATES_OF_NORMALIZED),
        Method("uniform, power of two", {**uniform, "modulus_scaling": "power_of_two"}),
        Method("uniform, exact", {**uniform, "modulus_scaling": "exact"}),
    ]
    return [
        *first,
        last[0],
        pools.pop(255),
        pools.pop(65535),
        last[1],
        registers.pop(4),
        registers.pop(16),
        last[2],
        *pools.values(),
        *registers.values(),
    ]


METHODS = {method.name: method for method in make_methods()}
#: So many come before those that begin with the other start.
FIRST = 13
#: Those that begin with the other start as well.
OF_BOTH_STARTS = ("MeZO", "exact gradient", pool(4095), on_the_fly(8))
