"""The knobs of a zeroth-order training, as a dataclass that works in `HfArgumentParser`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, get_args, get_type_hints

import torch

from .estimates import Estimator
from .lfsr import check_bits
from .numbers import Distribution, FreshNumbers, Numbers, OnTheFly, Pool
from .perturbation import Perturbation, Scaling

NumberReuse = Literal["none", "pool", "on_the_fly"]
ChosenDistribution = Literal["auto", "gaussian", "uniform"]
ChosenScaling = Literal["auto", "none", "exact", "power_of_two"]
Restoring = Literal["auto", "subtract", "copy"]


@dataclass
class ZeroOrderConfig:
    """How the slope of the loss is estimated, and where the numbers of the perturbations come from.

    The defaults are MeZO (Malladi et al. 2023, arXiv 2305.17333). `number_reuse` is PeZO (arXiv 2504.20314), whose
    pool sizes, register widths and formula of the scaling are not published: those here are this package's own.

    Raises:
        ValueError: on construction, if a value is not possible; the message says what is.
    """

    estimator: Estimator = field(
        default="two_point",
        metadata={
            "help": "two_point: losses on both sides of the weights. one_sided: the loss at the weights and at "
            "several places around them, with the step divided by the standard deviation of the slopes (as FZOO)."
        },
    )
    estimates: int = field(
        default=1, metadata={"help": "Directions a step, whose estimates are averaged; one_sided takes 2 at least."}
    )
    eps: float = field(default=1e-3, metadata={"help": "How far along a direction the loss is looked at."})
    distribution: ChosenDistribution = field(
        default="auto",
        metadata={"help": "gaussian or uniform; auto: uniform where numbers are reused, else gaussian."},
    )
    number_reuse: NumberReuse = field(
        default="none",
        metadata={
            "help": "none: a fresh number for every weight and direction. pool: `pool_size` numbers, drawn once and "
            "read on and on. on_the_fly: `registers` shift registers, which change places after every clock cycle."
        },
    )
    pool_size: int = field(default=4095, metadata={"help": "Numbers in the pool."})
    registers: int = field(default=8, metadata={"help": "Shift registers side by side."})
    number_bits: int = field(default=8, metadata={"help": "Bits of a reused number, and of a register: 4 to 16."})
    modulus_scaling: ChosenScaling = field(
        default="auto",
        metadata={
            "help": "exact: a direction has the length that Gaussian numbers are expected to have; power_of_two: the "
            "factor for that is rounded to a power of two; none; auto: power_of_two where numbers are reused, else "
            "none."
        },
    )
    restore_weights: Restoring = field(
        default="auto",
        metadata={
            "help": "How weights come back after a loss. subtract: what was added is subtracted, which takes no "
            "memory and leaves rounding errors. copy: bit for bit, from a copy of the trained weights. auto: copy "
            "where a trained weight has less than 32 bits, else subtract."
        },
    )

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for each in fields(self):
            choices, value = get_args(hints[each.name]), getattr(self, each.name)
            if choices and value not in choices:
                raise ValueError(f"{each.name}={value!r}: choose from {', '.join(choices)}.")
        if not self.eps > 0:
            raise ValueError(f"eps={self.eps!r}: the loss is looked at in some distance, larger than 0.")
        fewest = 2 if self.estimator == "one_sided" else 1
        if self.estimates < fewest:
            raise ValueError(f"estimates={self.estimates!r}: {self.estimator} takes {fewest} at least.")
        if self.distribution == "gaussian" and self.number_reuse != "none":
            raise ValueError(
                f"number_reuse='{self.number_reuse}' takes uniform numbers, of `number_bits` bits: leave out "
                "distribution='gaussian', or take number_reuse='none'."
            )
        check_bits(self.number_bits)
        self._make_numbers(length=1, seed=0)  # raises if there are no such

    @property
    def forward_passes(self) -> int:
        """Losses that a step takes of a batch."""
        return self.estimates + 1 if self.estimator == "one_sided" else 2 * self.estimates

    def make_perturbation(self, parameters: Sequence[torch.Tensor], seed: int) -> Perturbation:
        """The directions of a training.

        Args:
            parameters: all that are trained.
            seed: of the training.

        Raises:
            ValueError: if a parameter cannot be moved.
        """
        scaling: Scaling = "power_of_two" if self.number_reuse != "none" else "none"
        if self.modulus_scaling != "auto":
            scaling = self.modulus_scaling
        length = sum(parameter.numel() for parameter in parameters)
        return Perturbation(parameters, self._make_numbers(length, seed), scaling)

    def copies(self, parameters: Sequence[torch.Tensor]) -> bool:
        """Whether weights come back from a copy, if these are trained."""
        if self.restore_weights == "auto":
            return any(parameter.element_size() < 4 for parameter in parameters)
        return self.restore_weights == "copy"

    def _make_numbers(self, length: int, seed: int) -> Numbers:
        if self.number_reuse == "pool":
            return Pool(length, self.pool_size, self.number_bits, seed)
        if self.number_reuse == "on_the_fly":
            return OnTheFly(length, self.registers, self.number_bits, seed)
        fresh: Distribution = "uniform" if self.distribution == "uniform" else "gaussian"
        return FreshNumbers(fresh, seed)
