"""Inputs to try a model on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .errors import ChainError
from .inputs import main_input_name


def take_rows(inputs: Mapping[str, Any], rows: slice | list[int], batch_size: int) -> dict[str, Any]:
    """Some rows of every entry of a batch that has one row per sample; other entries as they are.

    Args:
        inputs: the batch.
        rows: which rows to take.
        batch_size: number of samples in the batch.
    """

    def cut_off(value):
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == batch_size:
            return value[rows]
        return value

    return {name: cut_off(value) for name, value in inputs.items()}


def synthetic_probe(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """Two random images of the size in `model.config`; None if the configuration has no size."""
    config = getattr(model, "config", None)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if channels is None or main_input_name(model) != "pixel_values":
        return None
    if size is None:
        size = 64  # the configuration of a convolutional family has no image size; the model takes any
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, channels, height, width, generator=generator)
    return {"pixel_values": pixels.to(parameter.device, parameter.dtype)}


def check_checkpointing(model: nn.Module) -> None:
    for name, module in model.named_modules():
        keywords = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
        if getattr(module, "gradient_checkpointing", False) and keywords.get("use_reentrant"):
            raise ChainError(
                f"'{name}' of {type(model).__name__} is checkpointed with use_reentrant=True, under which the blocks "
                "behind a frozen one get no gradient: use activation_checkpointing_kwargs={'use_reentrant': False}."
            )
