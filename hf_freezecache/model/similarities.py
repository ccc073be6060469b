"""Inner products of samples in the outputs of a model's blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .blocks import Block
from .inputs import main_input_name
from .modes import untouched
from .tokens import token_mask


def read_similarities(
    model: nn.Module,
    blocks: Sequence[Block],
    inputs: Mapping[str, Any],
    gram: Callable[[torch.Tensor], torch.Tensor],
) -> list[torch.Tensor]:
    """Runs a model once, in eval mode and without gradients; generators and what modules hold stay as they are.

    Args:
        model: not wrapped.
        blocks: some of its blocks, in their order.
        inputs: of the model, on its device; positions of texts that hold padding do not count.
        gram: makes `(N, N)` of an output `(N, ...)`.

    Returns:
        `(N, N)` on the CPU, block by block.

    Shapes: N samples.
    """
    found: dict[int, torch.Tensor] = {}
    mask = token_mask(inputs, main_input_name(model))

    def reading(place: int) -> Callable:
        def read(module: nn.Module, args: tuple, output: Any) -> None:
            value = output if isinstance(output, torch.Tensor) else output[0]
            if mask is not None and value.shape[: mask.ndim] == mask.shape:
                value = value * mask.to(value.device).reshape(*mask.shape, *[1] * (value.ndim - mask.ndim))
            found[place] = gram(value).cpu()

        return read

    hooks = [block.modules[-1].register_forward_hook(reading(place)) for place, block in enumerate(blocks)]
    try:
        with untouched(model), torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return [found[place] for place in range(len(blocks))]
