"""Whether the feature of a token is its own, whatever padding is beside the text: such features are stored alone."""

from __future__ import annotations

import torch
from torch import nn
from transformers.utils import logging

from ..distributed import Announcer
from ..rng import preserve_rng
from .capture import capture
from .errors import ChainError
from .modes import eval_mode
from .tokens import SIDES, padded_pair, token_mask
from .trace import Trace

logger = logging.get_logger(__name__)

#: By how much the feature of a token may differ without the padding, relative to the size of all: what kernels for
#: other widths round otherwise, in single precision and below it.
FINE, COARSE = 1e-2, 5e-2


def ignored_padding(model: nn.Module, trace: Trace, cut: int) -> frozenset[str]:
    """Sides on which padding changes no feature of a token; empty where features are no row of tokens.

    Args:
        model: the model.
        trace: its record.
        cut: from 1 on.
    """
    found = trace.cut(cut)
    if not found.has_tokens:
        return frozenset()
    token = getattr(getattr(model, "config", None), "pad_token_id", None)
    with preserve_rng(), torch.no_grad(), eval_mode(model):
        return frozenset(side for side in SIDES if _is_ignored(model, trace, cut, side, token or 0))


def _is_ignored(model: nn.Module, trace: Trace, cut: int, side: str, padding_token: int) -> bool:
    pair = padded_pair(trace.probe, trace.main_input, padding_token, side)
    if pair is None:
        return False
    padded, alone = pair
    mask = token_mask(padded, trace.main_input)
    assert mask is not None  # it was made here
    try:
        beside = capture(model, trace, cut, padded)[mask].double()
        own = capture(model, trace, cut, alone).flatten(0, 1).double()
    except ChainError:
        raise
    except Exception as error:  # the model's own code may raise anything
        Announcer.survived(logger, f"{type(model).__name__} does not run on padded texts", error)
        return False
    if beside.shape != own.shape:
        return False
    return relative_difference(beside, own) <= tolerance_of(trace.cut(cut).layout.dtype, own.device)


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference of two tensors, relative to that of the second."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


def tolerance_of(dtype: torch.dtype, device: torch.device) -> float:
    """The relative difference that rounding explains."""
    return COARSE if dtype != torch.float32 or torch.is_autocast_enabled(device.type) else FINE
