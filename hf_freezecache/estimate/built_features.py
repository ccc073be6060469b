"""Features of ranges in memory as a build stores them, where it runs other batches than an epoch."""

from __future__ import annotations

from functools import partial
from statistics import median_low

import torch

from ..build.context import BuildContext
from ..build.feature_sources import ImageFeatures, ViewRun
from ..build.store_spec import StoreSpec
from ..build.texts_by_length import run_together
from .loaded_ranges import LoadedRanges
from .trial_steps import timed


def run_as_built(
    context: BuildContext, spec: StoreSpec, loaded: LoadedRanges, features: list[torch.Tensor]
) -> tuple[list[ViewRun], float | None]:
    """The ranges as a build stores them, and seconds of a run in it; None: it is that of an epoch.

    Texts without padding run together, sorted by length; samples whose features are trimmed as wide as the widest;
    those that have sizes of their own, each size for itself.

    Args:
        context: the training.
        spec: the build.
        loaded: the ranges.
        features: of them as an epoch runs them.
    """
    has_rule = spec.source.rule is not None
    source = spec.source if has_rule else context.source
    built = ImageFeatures(context.chain, spec.cut, source, spec.layout, context.model_inputs)
    if spec.layout.is_token and not has_rule:
        probe = context.source.probe()
        together, spent = timed(lambda: run_together(built, loaded.rows, loaded.base, probe))
        return together, spent / len(loaded.rows)
    if has_rule:
        pairs = zip(loaded.stored, loaded.rows, strict=True)
        runs = [timed(partial(built.run_view, drawn, rows)) for drawn, rows in pairs]
        return [run for run, _ in runs], median_low([seconds for _, seconds in runs])
    splits = (spec.split(drawn.batch) for drawn in loaded.stored)
    return [ViewRun(split.columns, split.constants, own) for split, own in zip(splits, features, strict=True)], None
