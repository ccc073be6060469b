"""Sentinel rows: in every replay epoch a few rows are drawn and run live as well, and compared with the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..build.comparison import Difference, compare_rows, compare_settled
from ..build.context import BuildContext
from ..build.feature_sources import ImageFeatures
from ..build.spec_maker import WRITTEN
from ..build.survey import Augmentation
from ..build.trimming import stored_source, why_width_counts
from ..build.widest import sort_by_width
from ..cache.rows import ChosenRows, DrawnBatch, RowSource
from ..cache.shares import share_rows
from ..cache.store import FeatureStore
from ..rng import hash_key, preserve_rng

#: One row of so many is a sentinel; at least so many rows are, and at most a batch.
_ONE_IN, _FEWEST = 500, 4
#: Rows of which the narrowest are compared with what they are beside the widest sample.
_NARROW_OF = 8


def check_sentinels(
    context: BuildContext, store: FeatureStore, augmentation: Augmentation, epoch: int
) -> Difference | None:
    """Compares a few rows of a store, other ones in each epoch and on each process, with what they give now.

    Args:
        context: the training.
        store: that the epoch reads.
        augmentation: what is random in the samples.
        epoch: that begins; with the seed and the process it chooses the rows.

    Returns:
        The first difference; None if there is none.

    Raises:
        StoreError: if the store cannot be read.
        Exception: whatever the user's own code raises.
    """
    chain, cut = context.chain, store.manifest.cut
    if store.share is not None:  # a node stores these rows only
        context, store = replace(context, source=share_rows(context.source, store.share)), store.packed
    source = stored_source(chain, cut, context.source)
    generator = np.random.default_rng(hash_key("sentinels", source.seed, epoch, context.group.rank) & 0xFFFFFFFF)
    is_opaque = augmentation.random and not augmentation.replayable
    rows: Sequence[int]
    if is_opaque:
        # Their random numbers depend on the range: it is drawn as the build has drawn it.
        number = int(generator.integers(source.num_ranges))
        chosen, numbers, rows = source, [number], source.rows(number)
    else:
        count = min(source.batch_size, len(source), max(_FEWEST, len(source) // _ONE_IN))
        rows = sorted(generator.choice(len(source), count, replace=False).tolist())
        chosen, numbers = _Again(source, rows, 0 if augmentation.random else epoch + 1), [0]
    layout = chain.stored_layout(cut)
    features = ImageFeatures(chain, cut, chosen, layout, context.model_inputs)
    drawn_once = is_opaque and WRITTEN in store.manifest.made_from  # in a batch that does not come again
    views = 1 if drawn_once or (store.manifest.views and augmentation.replayable) else 0
    geometry = store.views.spec.geometry if views else None
    if chain.padding.trimmed(cut) is not None:
        narrow = sort_by_width(context.source, chain.main_input, rows[:_NARROW_OF])[:2]
        with preserve_rng():
            why, _ = why_width_counts(context, cut, narrow)
        if why is not None:
            return Difference(rows[0], 0, "features", why)
    with preserve_rng():
        _, view_runs = next(iter(features.run(numbers, views, geometry, own_features=not drawn_once)))
    if drawn_once:
        return compare_settled(store, rows, view_runs)
    for view, view_run in enumerate(view_runs):
        found = compare_rows(store, rows, view, view_run)
        if found is not None:
            return found
    return None


class _Again(ChosenRows):
    """Rows of another source, with other numbers for what is random without anybody knowing of it."""

    def __init__(self, source: RowSource, row_numbers: Sequence[int], again: int):
        super().__init__(source, row_numbers)
        self._again = again

    def draw(
        self,
        indices: Sequence[int],
        view: int = 0,
        geometry: tuple[str, tuple[int, int]] | None = None,
        again: int = 0,
    ) -> DrawnBatch:
        return super().draw(indices, view, geometry, again or self._again)
