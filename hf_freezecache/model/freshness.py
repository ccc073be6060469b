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


def is_untrained(model: nn.Module) -> bool:
    """Whether a model as a whole has the weights of its initialization.

    Those of normalizations are all 1 then, and biases all 0; training moves each number elsewhere.
    """
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1 and parameter.numel() > 1]
    return bool(vectors) and sum(map(_is_constant, vectors)) > _CONSTANT * len(vectors)


def is_fresh(module: nn.Module) -> bool:
    """Whether the parameters that a module itself holds are those of an initialization, as far as can be told.

    A bias tells: it is constant, or it and the weights are drawn uniformly, as those of `nn.Linear` are, from
    `1 / sqrt(inputs)` on both sides of 0. A module without a bias counts as trained.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, nn.Parameter) or not isinstance(bias, nn.Parameter):
        return False
    if bias.numel() > 1 and _is_constant(bias) and (weight.ndim > 1 or _is_constant(weight)):
        return True
    if weight.ndim < 2:
        return False
    bound = 1 / math.sqrt(weight[0].numel())
    largest = float(weight.detach().abs().max())
    return _NEAR * bound <= largest <= bound * 1.001 and float(bias.detach().abs().max()) <= bound * 1.001


def _is_constant(parameter: torch.Tensor) -> bool:
    values = parameter.detach().flatten()
    return bool((values == values[0]).all())
