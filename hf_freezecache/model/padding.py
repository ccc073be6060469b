"""Whether the feature of a token is its own, whatever padding is beside the text: such features are stored alone."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import logging

from ..distributed import Announcer
from ..rng import preserve_rng
from .capture import capture
from .errors import ChainError
from .layout import FeatureLayout, from_positions
from .modes import eval_mode
from .resizing import resize, trimmed_to
from .rounding import relative_difference
from .stand_ins import stays_real
from .tokens import SIDES, padded_pair, token_mask
from .trace import Trace

if TYPE_CHECKING:
    from .chain import BlockChain

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Trimming:
    """How features that include padding are those of batches of any width.

    Args:
        side: on which padding is, `right` or `left`: there the features of a narrower batch end.
        probe: model inputs of a few samples as wide as the widest, whose features stores hold.
    """

    side: str
    probe: Mapping[str, Any]


class Padding:
    """Whether padding is part of the features at the cuts of a chain.

    Args:
        chain: the model as a chain.
    """

    def __init__(self, chain: BlockChain):
        self._chain = weakref.proxy(chain)  # which holds this: both are freed at once
        self._why_kept: dict[int, str] = {}
        self._trimmed: dict[int, Trimming] = {}
        self._why_not_trimmed: dict[int, str] = {}
        self._sized: set[int] = set()

    def ignored(self, cut: int) -> frozenset[str]:
        """Sides on which padding changes no feature of a token at a cut: stores leave it out.

        Empty where the feature of a sample is not a vector for each position of its text, the model's inputs have no
        `attention_mask`, or what comes behind the cut reads what is at padding.
        """
        if not cut or cut in self._why_kept or self.is_any_size(cut):
            return frozenset()
        trace = self._chain.own_trace()
        if cut not in trace.ignored_padding:
            trace.ignored_padding[cut] = _ignored_sides(self._chain.model, trace, cut)
        return trace.ignored_padding[cut]

    def why_counts(self, cut: int) -> str:
        """Why `ignored` is empty at a cut, as far as the features themselves are the reason; a clause."""
        trace = self._chain.own_trace()
        if not stays_real(trace.probe[trace.main_input]):
            return "the frozen blocks read it as they read a sample"
        name = _own_width(trace, cut)
        if name is not None:
            return f"they depend on '{name}', which has a width of its own"
        if trace.cut(cut).has_tokens:
            return "padding changes the features of the tokens beside it"
        return "the features there are not one vector for each token of a text"

    def keep(self, cut: int, why: str) -> None:
        """From now on, features at a cut include padding: samples must have one width there, unless they are trimmed.

        Args:
            cut: from 1 on.
            why: as a clause.
        """
        self._why_kept[cut] = why

    def why_kept(self, cut: int) -> str | None:
        """Why features at a cut include padding, as `keep` was told; None if it was not."""
        return self._why_kept.get(cut)

    def trim(self, cut: int, trimming: Trimming) -> None:
        """From now on, features at a cut include padding, and those of the widest are trimmed to a batch's width.

        Args:
            cut: from 1 on.
            trimming: how.
        """
        self._trimmed[cut] = trimming

    def keep_sizes(self, cut: int) -> None:
        """From now on, samples have features of their own sizes at a cut, and those of a batch one size.

        Args:
            cut: from 1 on.
        """
        self._sized.add(cut)

    def has_sizes(self, cut: int) -> bool:
        """Whether samples have features of their own sizes at a cut, as `keep_sizes` was told."""
        return cut in self._sized

    def is_any_size(self, cut: int) -> bool:
        """Whether features at a cut are those of inputs of any size: trimmed, or of their own sizes."""
        return cut in self._trimmed or cut in self._sized

    def stop_trimming(self, cut: int, why: str) -> None:
        """From now on, features at a cut have one size: they are not trimmed, and have no sizes of their own.

        Args:
            cut: from 1 on.
            why: as a clause.
        """
        self._trimmed.pop(cut, None)
        self._sized.discard(cut)
        self._why_not_trimmed[cut] = why

    def why_not_trimmed(self, cut: int) -> str | None:
        """Why features at a cut must have one size, as `stop_trimming` was told; None if it was not."""
        return self._why_not_trimmed.get(cut)

    def trimmed(self, cut: int) -> Trimming | None:
        """How features at a cut are trimmed, as `trim` was told; None if they are not."""
        return self._trimmed.get(cut)

    def widest_trace(self, cut: int) -> Trace:
        """The chain's trace, of inputs as wide as the widest; made again if it is of others.

        Args:
            cut: at which features are trimmed.
        """
        trace, probe = self._chain.own_trace(), self._trimmed[cut].probe
        return trace if trace.size == tuple(probe[trace.main_input].shape[1:]) else self._chain.trace(probe)

    def layout_of(self, inputs: Mapping[str, Any], cut: int) -> FeatureLayout:
        """The layout of the features of a batch, in its own size where features have any.

        Args:
            inputs: model inputs of the batch by name; its main input may be a stand-in.
            cut: from 1 on.

        Raises:
            ChainError: if the model does not run on inputs of this size.
        """
        if not self.is_any_size(cut):
            return self._chain.layout(cut)
        trace = self._chain.own_trace() if self.has_sizes(cut) else self.widest_trace(cut)
        return resize(self._chain.model, trace, cut, inputs).layout

    def positions(self, inputs: Mapping[str, Any], cut: int) -> int:
        """Number of positions of the features of samples that have sizes of their own.

        Args:
            inputs: model inputs of a batch of one size.
            cut: from 1 on.

        Raises:
            ChainError: if the model does not run on inputs of this size.
        """
        layout = self.layout_of(inputs, cut)
        return layout.values // layout.channels

    def fit_features(self, features: torch.Tensor, inputs: Mapping[str, Any], cut: int) -> torch.Tensor:
        """Features of a batch from what a store has of them; replays fit inputs of its size from then on.

        Args:
            features: where they are trimmed, those of the same samples as wide as the widest, `(B, *layout.shape)` of
                `BlockChain.stored_layout`; where samples have sizes of their own, `(B, P, C)`.
            inputs: model inputs of the batch by name; of a main input of real numbers the shape alone counts.
            cut: at which features have any size.

        Raises:
            ChainError: if the model does not run on inputs of this size.

        Shapes: B samples, P positions, C channels.
        """
        trace = self._chain.own_trace() if self.has_sizes(cut) else self.widest_trace(cut)
        own = resize(self._chain.model, trace, cut, inputs)
        if not self.has_sizes(cut):
            return trimmed_to(own, features, trace.cut(cut), self._trimmed[cut].side)
        if features[0].numel() != own.layout.values:
            size = tuple(inputs[trace.main_input].shape[1:])
            raise ChainError(
                f"inputs of shape {size} have features of shape {own.layout.shape} at cut {cut}, and the store "
                f"{features.shape[1]} positions of {features.shape[2]} channels"
            )
        return from_positions(features, own.layout.shape)


def _ignored_sides(model: nn.Module, trace: Trace, cut: int) -> frozenset[str]:
    found = trace.cut(cut)
    if not found.has_tokens or _own_width(trace, cut) is not None:
        return frozenset()
    token = getattr(getattr(model, "config", None), "pad_token_id", None)
    with preserve_rng(), torch.no_grad(), eval_mode(model):
        return frozenset(side for side in SIDES if _is_ignored(model, trace, cut, side, token or 0))


def _own_width(trace: Trace, cut: int) -> str | None:
    """The name of an input with a width of its own on which the feature at a cut depends; None if there is none."""
    last = trace.probe[trace.main_input].ndim - 1
    for name in sorted(trace.cut(cut).boundary.inputs):
        value = trace.probe[name]
        if not value.is_floating_point() and value.ndim > last and value.shape[last] not in (1, trace.width):
            return name
    return None


def _is_ignored(model: nn.Module, trace: Trace, cut: int, side: str, padding_token: int) -> bool:
    pair = padded_pair(trace.probe, trace.main_input, padding_token, side)
    if pair is None:
        return False
    padded, alone = pair
    mask = token_mask(padded, trace.main_input)
    assert mask is not None  # it was made here
    try:
        beside = capture(model, trace, cut, padded)[mask.flatten(1)].double()
        own = capture(model, trace, cut, alone).flatten(0, 1).double()
    except ChainError:
        raise
    except Exception as error:  # the model's own code may raise anything
        Announcer.survived(logger, f"{type(model).__name__} does not run on padded texts", error)
        return False
    if beside.shape != own.shape:
        return False
    return relative_difference(beside, own) <= trace.tolerance(trace.cut(cut).layout.dtype, own.device)
