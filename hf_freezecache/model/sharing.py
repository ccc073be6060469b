"""Parameters that blocks share: whoever freezes one block freezes a part of another."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..rng import preserve_rng
from .errors import ChainError
from .modes import eval_mode
from .structure import accept_feature, first_tensor
from .tracing import Block, run_trace


def check_sharing(model: nn.Module, blocks: Sequence[Block], inputs: Mapping[str, Any]) -> None:
    """Checks that no trainable parameter is used by several blocks, or by a block and the head.

    Runs the model once, with the gradient cut off between the blocks: a parameter that gets a gradient from several of
    the parts is shared, whether it has two names, is read by a function of another module, or makes something that
    several blocks take (a position bias of all layers).

    Args:
        model: the model; left as it is.
        blocks: its blocks, in the order in which they run.
        inputs: a small batch of model inputs.

    Raises:
        ChainError: if one is; the message names the parameter, its users and the remedies.
    """
    parts = [block.name for block in blocks] + ["the head"]
    for parameter, users in _users(model, blocks, dict(inputs)).items():
        if len(users) > 1:
            names = [name for name, other in model.named_parameters(remove_duplicate=False) if other is parameter]
            also = f" (also '{names[1]}')" if len(names) > 1 else ""
            raise ChainError(
                f"'{names[0]}'{also} of {type(model).__name__} is used by '{parts[users[0]]}' and by "
                f"'{parts[users[-1]]}': freezing the first would freeze a part of the second. Give each a parameter "
                "of its own (models of Transformers: tie_word_embeddings=False), set its requires_grad to False, or "
                "train with policy='none'."
            )


def _users(model: nn.Module, blocks: Sequence[Block], inputs: dict[str, Any]) -> dict[nn.Parameter, list[int]]:
    """Every trainable parameter with the numbers of the parts that use it: blocks, then the head."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    users: dict[nn.Parameter, list[int]] = defaultdict(list)
    if not trainable:
        return users
    with preserve_rng(), torch.enable_grad(), eval_mode(model), _parted(model, blocks, inputs) as ends:
        ends.append(first_tensor(model(**inputs)))
        for number, end in enumerate(ends):
            if end.requires_grad:
                gradients = torch.autograd.grad(end.float().sum(), trainable, retain_graph=True, allow_unused=True)
                for parameter, gradient in zip(trainable, gradients, strict=True):
                    if gradient is not None:
                        users[parameter].append(number)
    return users


@contextlib.contextmanager
def _parted(model: nn.Module, blocks: Sequence[Block], inputs: dict[str, Any]) -> Iterator[list[torch.Tensor]]:
    """Inside, the gradient does not pass from block to block; yields the features that left the blocks."""
    trace, ends = run_trace(model, blocks, inputs), []

    def cut_before(number: int):
        def hook(module, args, kwargs):
            feature = trace.injected(number, args, kwargs)
            ends.append(feature)
            return trace.inject(number, args, kwargs, feature.detach())

        return hook

    def cut_after(module, args, output):
        feature = first_tensor(output)
        ends.append(feature)
        return accept_feature(output, feature.detach())

    handles = [
        block.modules[0].register_forward_pre_hook(cut_before(number), with_kwargs=True)
        for number, block in enumerate(blocks)
        if number
    ]
    handles.append(blocks[-1].modules[-1].register_forward_hook(cut_after))
    try:
        yield ends
    finally:
        for handle in handles:
            handle.remove()
