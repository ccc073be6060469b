"""Inputs to try a model on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction
from transformers.utils import logging

from ..distributed import Announcer
from .errors import ChainError
from .inputs import main_input_name
from .modes import untouched

logger = logging.get_logger(__name__)


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


def check_own_checkpoints(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Checks in a run in train mode that no code of the model checkpoints with `use_reentrant=True`.

    Such a checkpoint gives parameters a gradient only if its inputs have one, which those behind a frozen block have
    not: torch warns, and what lies in it is not trained.

    Args:
        model: the model; left as it is.
        inputs: its inputs, with labels if it needs them to train.

    Raises:
        ChainError: if it does.
    """
    with _seeing_reentrant() as seen, untouched(model), torch.no_grad():
        model.train()
        try:
            model(**inputs)
        except Exception as error:  # the model's own code may raise anything; the proof tells what bars a cut
            Announcer.survived(logger, f"{type(model).__name__} does not train on a probe batch", error)
    if seen:
        raise ChainError(
            f"{type(model).__name__} checkpoints activations with use_reentrant=True (torch.utils.checkpoint, or "
            "timm.layers.set_reentrant_ckpt), under which the blocks behind a frozen one get no gradient: use "
            "use_reentrant=False."
        )


@contextlib.contextmanager
def _seeing_reentrant() -> Iterator[list[Any]]:
    """Inside, functions that are run in a reentrant checkpoint are collected."""
    seen: list[Any] = []
    apply = CheckpointFunction.apply

    def collect(function: Any, *args: Any) -> Any:
        seen.append(function)
        return apply(function, *args)

    CheckpointFunction.apply = staticmethod(collect)
    try:
        yield seen
    finally:
        del CheckpointFunction.apply  # its base class has it


def first_rows(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Two rows to record a run on."""
    check_inputs(model, inputs)
    return take_rows(inputs, slice(2), len(inputs[main_input_name(model)]))


def check_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raises ChainError if inputs lack the main one."""
    if main_input_name(model) not in inputs:
        raise ChainError(
            f"{type(model).__name__} reads '{main_input_name(model)}', but the batch has only {sorted(inputs)}."
        )
