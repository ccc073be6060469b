"""Samples of several sizes, of which each batch has one: found, and proved from the smallest to the largest."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers.utils import logging

from ..cache.rows import RowError, RowSource
from ..cache.sized import BySize, SizeRule, size_of
from ..distributed import Announcer, describe_error
from ..model.errors import ChainError
from ..model.layout import to_positions
from ..model.tokens import token_mask
from ..rng import preserve_rng
from .context import BuildContext
from .materialize import spread
from .spread_rows import spread_rows

logger = logging.get_logger(__name__)

#: Samples that are looked at, and how many of them are collated together.
_ROWS, _TOGETHER = 24, 8
#: Sizes at which features are compared, and samples of each.
_SIZES, _OF_A_SIZE = 9, 4


def rows_by_size(source: RowSource, main_input: str) -> Sequence[Sequence[int]]:
    """Rows from all over a data set by the size of their main input, the smallest first; looked at once.

    Empty where all have one size, or the collator brings those of a batch to one: pads them, for example.

    Args:
        source: the samples.
        main_input: name of the model's main input in a batch.
    """
    if source.sizes is None:
        with preserve_rng():
            source.sizes = _rows_by_size(source, main_input)
    return source.sizes


def _rows_by_size(source: RowSource, main_input: str) -> Sequence[Sequence[int]]:
    rows = spread_rows(source.dataset, _ROWS, source.seed)
    if source.batch_size > 1:
        try:
            source.collate(rows[: max(_TOGETHER, source.batch_size)])
            return ()
        except Exception as error:  # whatever a collator raises about samples that it cannot put together
            Announcer.survived(logger, "Samples from all over the data set cannot be collated together", error)
    found: dict[tuple[int, ...], list[int]] = {}
    try:
        for row in rows:
            batch = source.collate([row])
            if token_mask(batch, main_input) is not None:
                return ()  # a text: padding is all that its size is
            found.setdefault(size_of(batch, main_input), []).append(row)
    except Exception as error:  # whatever a collator raises; what comes next says so in words
        Announcer.survived(logger, "A sample cannot be collated alone", error)
        return ()
    return tuple(tuple(found[size]) for size in sorted(found, key=_extent)) if len(found) > 1 else ()


def _extent(size: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    total = 1
    for each in size:
        total *= each
    return total, size


def use_common_size(source: RowSource, main_input: str) -> bool:
    """Lets rows of the most common size stand for all, where the first ones cannot be collated together.

    Args:
        source: the samples.
        main_input: name of the model's main input in a batch.

    Returns:
        Whether there are several sizes.
    """
    sizes = rows_by_size(source, main_input)
    if sizes:
        common = max(sizes, key=len)
        source.probe_rows = [common[0], common[-1]]
    return bool(sizes)


def sized(source: RowSource, main_input: str, read: Collection[str]) -> RowSource:
    """The same samples, those of equal size collated together; `source` keeps it for the next call.

    Args:
        source: samples of several sizes.
        main_input: name of the model's main input in a batch.
        read: names of all that the frozen blocks read.
    """
    before = source.wide.rule if source.wide is not None else None
    known = before.read if isinstance(before, SizeRule) else frozenset()
    if source.wide is None or not known >= {*read}:
        source.wide = source.collated_by(BySize(source.collator, main_input, source.batch_size))
        source.wide.rule = SizeRule(main_input, known | {main_input, *read})
    return source.wide


def one_of_each_size(source: RowSource, most: int = _SIZES) -> list[Mapping[str, Any]]:
    """Batches of one size each, from the smallest to the largest.

    Args:
        source: samples whose `sizes` are known.
        most: number of batches.

    Raises:
        Exception: whatever the collator raises.
    """
    assert source.sizes  # the caller knows
    places, count = spread(len(source.sizes), min(most, len(source.sizes))), min(source.batch_size, _OF_A_SIZE)
    with preserve_rng():
        return [source.collate(source.sizes[place][:count]) for place in places]


def why_not_of_several_sizes(context: BuildContext, cut: int) -> str | None:
    """Keeps the sizes of features at a cut, and proves on this process that this can be done.

    At each size the features must be one vector for each position, at as many positions as the model tells without
    running on values; the rest of the model, told so, must give on them what the whole model gives.

    Args:
        context: the training, whose samples have several sizes.
        cut: from 1 on.

    Returns:
        Why it cannot be done, as a clause; None if it can.
    """
    source, chain = context.source, context.chain
    assert source.sizes  # the caller knows
    if source.batch_size > 1 and all(len(rows) < 2 for rows in source.sizes):
        return "no two of the samples that were looked at have one size, so that no batch could be tried"
    try:
        with preserve_rng():
            sized(source, chain.main_input, chain.inputs_of(cut))
            chain.padding.keep_sizes(cut)
            chain.trace(context.model_inputs(source.probe()))
            for batch in one_of_each_size(source):
                why = _why_not_at(context, cut, context.model_inputs(batch))
                if why is not None:
                    return why
        return None
    except (ChainError, RowError) as error:
        return str(error).rstrip(".")
    except Exception as error:  # the user's own code may raise anything
        Announcer.survived(logger, "Features of several sizes could not be tried", error)
        return f"trying it failed with {describe_error(error)}"


def _why_not_at(context: BuildContext, cut: int, inputs: Mapping[str, Any]) -> str | None:
    chain = context.chain
    size, features = tuple(inputs[chain.main_input].shape[1:]), chain.prefix(inputs, cut)
    vectors, channels = to_positions(features), chain.stored_layout(cut).channels
    if vectors.shape[2] != channels:
        return f"those of inputs of shape {size} have {vectors.shape[2]} channels, and others have {channels}"
    if not chain.padding.fit_features(vectors, inputs, cut).equal(features):
        return f"those of inputs of shape {size} have another shape than the model tells: {tuple(features.shape[1:])}"
    chain.prove(inputs, cut)
    return None
