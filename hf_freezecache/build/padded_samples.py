"""Samples without a common width: whether they are such, and what the frozen blocks read of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from transformers.utils import logging

from ..augment.draws import Draw, use_draw
from ..cache.padded import PaddingRule, split_padded
from ..cache.rows import BatchSplit, RowSource, fetch
from ..cache.sized import SizeRule, split_sized
from ..cache.texts import split_texts
from ..distributed import Announcer
from ..model.tokens import token_mask
from ..rng import seeded_rng
from .several_sizes import rows_by_size, sized
from .spread_rows import spread_rows
from .widest import widened

logger = logging.get_logger(__name__)

#: Samples that are looked at.
_ROWS = 24


def collator_pads(source: RowSource, main_input: str) -> bool:
    """Whether the collator pads samples to the longest of a batch, not to one width; looked at once.

    Args:
        source: the samples.
        main_input: name of the model's main input in a batch.
    """
    if source.is_padded is None:
        source.is_padded = _pads(source, main_input)
    return source.is_padded


def _pads(source: RowSource, main_input: str) -> bool:
    try:
        chosen = list(spread_rows(source.dataset, _ROWS, source.seed))[: source.batch_size]
        with seeded_rng(source.seed, "padding"):
            with use_draw(Draw(source.seed, chosen)):
                samples = fetch(source.dataset, chosen)
            # Collators take entries out of samples, and change them in place.
            batch = source.collator(copy.deepcopy(samples))
            mask = token_mask(batch, main_input)
            main = batch.get(main_input) if isinstance(batch, Mapping) else None
            if not isinstance(main, torch.Tensor) or not isinstance(samples, list):
                return False
            # Of texts the shortest one shows it; of others it is not known which that is.
            singles = samples if mask is None else [samples[int(mask.flatten(1).sum(1).argmin())]]
            alone = (source.collator([copy.deepcopy(sample)])[main_input] for sample in singles)
            return any(own.ndim == main.ndim and own.shape[1:] != main.shape[1:] for own in alone)
    except Exception as error:  # whatever a collator raises; what comes next says so in words
        Announcer.survived(logger, "Samples from all over the data set cannot be collated together", error)
        return False


def has_widths(source: RowSource, main_input: str) -> bool:
    """Whether samples have no common width: the collator pads them, or each batch has a size of its own.

    Args:
        source: the samples.
        main_input: name of the model's main input in a batch.
    """
    return collator_pads(source, main_input) or bool(rows_by_size(source, main_input))


def padded_split(source: RowSource, main_input: str) -> tuple[RowSource, Callable[[Any], BatchSplit]]:
    """Samples without a common width, and what tells what the frozen blocks read of them.

    Of texts these are tokens; of others the numbers of samples: each batch as wide as the widest of all, or samples of
    equal size together.

    Args:
        source: the samples.
        main_input: name of the model's main input in a batch.

    Raises:
        RowError: if it cannot be told how the collator pads.
    """
    if rows_by_size(source, main_input):
        own = sized(source, main_input, source.texts.read)
        assert isinstance(own.rule, SizeRule)  # of such samples
        return own, partial(split_sized, rule=own.rule)
    if token_mask(source.probe(), main_input) is not None:
        return source, partial(split_texts, texts=source.texts)
    wide = widened(source, main_input, source.texts.read)
    assert isinstance(wide.rule, PaddingRule)  # of such samples
    return wide, partial(split_padded, rule=wide.rule)


def what_is_read(source: RowSource) -> str:
    """What `padded_split` tells of samples, for messages."""
    return "the tokens of a text" if source.rule is None else "the numbers of a sample"
