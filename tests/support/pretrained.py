"""Tiny models with the numbers of trained ones, but for their head."""

from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def settle(model: Model, head: str = "classifier") -> Model:
    """Moves biases and weights of normalizations off what an initialization makes them, as training does.

    Args:
        model: left with its head as it is.
        head: how the names of the head's parameters begin.
    """
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and not name.startswith(head):
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model
