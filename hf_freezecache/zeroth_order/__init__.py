"""Training without a backward pass: loss differences along reproducible perturbations of the weights."""

from .lfsr import LFSR

__all__ = ["LFSR"]
