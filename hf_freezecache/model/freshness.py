"""Whether weights are those of an initialization, told by their numbers: libraries do not say how a model was made."""

from __future__ import annotations

import math

import torch
from torch import nn

#: Share of the vectors of a model that are constant from which on it counts as untrained: of initialized models of
#: timm, torchvision and Transformers it is 0.76 to 1, of trained ones next to nothing.
_CONSTANT = 0.5
#: How near to its bound the largest of some uniformly drawn numbers is, at least.
_NEAR = 0.8
#: Drawn weights are no larger than 1.5 times those by He et al. 2015 (arXiv 1502.01852) for the shorter side. Singular
#: values are so far beyond their middle, in units of the weights' size, with a probability of 4e-6 at most.
_LARGEST, _BEYOND = 1.5, 5.0
#: Rows that are looked at, at most, and the relative difference below which lengths count as equal.
_MOST_ROWS, _EQUAL = 1024, 1e-4


def is_untrained(model: nn.Module) -> bool:
    """Whether a model as a whole has the weights of its initialization.

    Those of normalizations are all 1 then, and biases all 0; training moves each number elsewhere.
    """
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1 and parameter.numel() > 1]
    return bool(vectors) and sum(map(_is_constant, vectors)) > _CONSTANT * len(vectors)


def is_fresh(module: nn.Module) -> bool:
    """Whether the parameters that a module itself holds are those of an initialization, as far as can be told.

    A bias tells: it is constant (0, if it is a single number) and the weights may have been drawn independently; or it
    and the weights are drawn uniformly, as those of `nn.Linear` are, from `1 / sqrt(inputs)` on both sides of 0. A
    module without a bias counts as trained.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, nn.Parameter) or not isinstance(bias, nn.Parameter):
        return False
    if weight.ndim < 2:
        return bias.numel() > 1 and _is_constant(bias) and _is_constant(weight)
    if _is_constant(bias) and (bias.numel() > 1 or not bias.any()):
        return _may_be_drawn(weight.detach().cpu().flatten(1).double())  # some accelerators have no such numbers
    bound = 1 / math.sqrt(weight[0].numel())
    largest = float(weight.detach().abs().max())
    return _NEAR * bound <= largest <= bound * 1.001 and float(bias.detach().abs().max()) <= bound * 1.001


def _may_be_drawn(weight: torch.Tensor) -> bool:
    """Whether numbers may be independent ones around 0, or rows at right angles (`nn.init.orthogonal_`).

    Class names that a text encoder has embedded, means of classes and solutions without an intercept are not: they are
    large, or their rows depend on each other, or have one length. The singular values of `(K, D)` independent Gaussian
    numbers of variance 1 are within `sqrt(D) - sqrt(K) - t` and `sqrt(D) + sqrt(K) + t`, each bound with a probability
    of `1 - exp(-t**2 / 2)` at least (Davidson and Szarek 2001, theorem II.13). Of few numbers they tell little.

    Args:
        weight: float64 `(K, D)`, on the CPU.
    """
    if _is_constant(weight):
        return True
    some = weight[:_MOST_ROWS]
    short, long = sorted(some.shape)
    size = float(some.square().mean().sqrt())
    if not size <= _LARGEST * math.sqrt(2 / short):  # nor is a number that is none
        return False
    values, middle, width = torch.linalg.svdvals(some) / size, math.sqrt(long), math.sqrt(short) + _BEYOND
    if values[0] > middle + width or values[-1] < middle - width:
        return False
    lengths = some.norm(dim=1)
    are_equal = len(some) > 2 and float(lengths.max() - lengths.min()) < _EQUAL * float(lengths.mean())
    return not are_equal or float(values[0] - values[-1]) < _EQUAL * float(values[0])


def _is_constant(parameter: torch.Tensor) -> bool:
    values = parameter.detach().flatten()
    return bool((values == values[0]).all())
