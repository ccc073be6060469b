"""Whether features that include padding can be stored as wide as the widest sample, and trimmed to each batch's width.

That is proved on samples of several widths: the features of a batch must be those of the same samples beside the
widest, but for the positions that the batch does not have.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers.utils import logging

from ..cache.padded import PaddingRule
from ..cache.rows import RowError, RowSource
from ..distributed import Announcer, describe_error
from ..model.chain import BlockChain
from ..model.errors import ChainError
from ..model.padding import Trimming
from ..model.probes import first_rows
from ..model.rounding import relative_difference
from ..rng import preserve_rng
from .context import BuildContext
from .materialize import spread
from .several_sizes import rows_by_size, why_not_of_several_sizes
from .widest import rows_by_width, widened, widest_of

logger = logging.get_logger(__name__)

#: Widths of batches at which features are compared.
_WIDTHS = 9


def settle_trimming(context: BuildContext, cut: int) -> str | None:
    """Finds out, once for each cut, whether features can be trimmed, or stored in their own sizes.

    If so, they are from now on. All processes find the same.

    Args:
        context: the training, whose collator pads samples to the widest of a batch, or whose batches differ in size.
        cut: from 1 on, at which features include padding.

    Returns:
        Why they cannot, as a clause; None if they can.
    """
    padding, group = context.chain.padding, context.group
    if padding.is_any_size(cut) or padding.why_not_trimmed(cut) is not None:
        return padding.why_not_trimmed(cut)
    context.source.sizes = group.on_main(lambda: rows_by_size(context.source, context.chain.main_input))
    if context.source.sizes:
        found = group.gather(why_not_of_several_sizes(context, cut))
    else:
        widest = group.on_main(lambda: _widest_row(context))
        found = group.gather(_why_not(context, cut, widest))
    why = next((reason for reason in found if reason is not None), None)
    if why is not None:
        padding.stop_trimming(cut, why)
    return why


def stored_source(chain: BlockChain, cut: int, source: RowSource) -> RowSource:
    """The samples as stores at a cut hold them: as wide as the widest where features are trimmed, or by their size."""
    if not chain.padding.is_any_size(cut):
        return source
    assert source.wide is not None  # it was found with the proof
    return source.wide


def _widest_row(context: BuildContext) -> int | str:
    """Row number of the widest sample; or why it is not known."""
    try:
        return widest_of(context.source, context.chain.main_input)
    except Exception as error:  # the user's own code may raise anything
        Announcer.survived(logger, "The widest sample could not be found", error)
        return f"the samples could not be looked at: {describe_error(error)}"


def _why_not(context: BuildContext, cut: int, widest: int | str) -> str | None:
    """Trims features at a cut, and proves it on this process."""
    if isinstance(widest, str):
        return widest
    source, chain = context.source, context.chain
    try:
        with preserve_rng():
            wide = widened(source, chain.main_input, chain.inputs_of(cut), widest)
            assert isinstance(wide.rule, PaddingRule)  # of such a source
            probe = context.model_inputs(wide.probe())
            chain.padding.trim(cut, Trimming(wide.rule.side, first_rows(chain.model, probe)))
            chain.trace(probe)
            chain.prove(probe, cut)
            return _why_differs(context, cut, wide)
    except (ChainError, RowError) as error:
        return str(error).rstrip(".")
    except Exception as error:  # the user's own code may raise anything
        Announcer.survived(logger, "Features could not be trimmed", error)
        return f"trying it failed with {describe_error(error)}"


def _why_differs(context: BuildContext, cut: int, wide: RowSource) -> str | None:
    """Compares features of batches of several widths with those of the same samples beside the widest."""
    assert isinstance(wide.rule, PaddingRule)  # of such a source
    rows = rows_by_width(context.source, context.chain.main_input)
    others = [rows[place] for place in spread(len(rows), min(_WIDTHS, len(rows)))][1:]
    narrower = 0
    for other in others:
        why, size = why_width_counts(context, cut, [rows[0], other])
        if why is not None:
            return why
        narrower += size != wide.rule.size
    return None if narrower else "none of the samples that were looked at is narrower than the widest"


def why_width_counts(context: BuildContext, cut: int, rows: Sequence[int]) -> tuple[str | None, tuple[int, ...]]:
    """Compares the features of a batch with those of the same samples beside the widest, trimmed to its width.

    Args:
        context: the training.
        cut: at which features are trimmed.
        rows: of the batch.

    Returns:
        Why they are not the same, as a clause, None if they are; and the size of the batch's main input.
    """
    chain, source = context.chain, context.source
    inputs, beside = (context.model_inputs(each.collate(rows)) for each in (source, stored_source(chain, cut, source)))
    size = tuple(inputs[chain.main_input].shape[1:])
    own, whole = chain.prefix(inputs, cut), chain.prefix(beside, cut)
    trimmed = chain.padding.fit_features(whole, inputs, cut)
    if own.shape != trimmed.shape:
        shapes = f"{tuple(own.shape[1:])}, not {tuple(trimmed.shape[1:])}"
        return f"those of a narrower batch have the shape {shapes}", size
    dim = 1 + chain.layout(cut).channel_dim
    found, expected = (each.movedim(dim, -1).reshape(-1, each.shape[dim]) for each in (trimmed, own))
    difference = relative_difference(found, expected)
    if difference <= chain.own_trace().tolerance(own.dtype, own.device):
        return None, size
    beside_wider = f"beside a wider sample they differ by {100 * difference:.2g} % at a position"
    return f"the width of a batch changes them: {beside_wider}", size
