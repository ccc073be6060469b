"""Features of ranges in memory as a build stores them, where it runs other batches than an epoch."""

from __future__ import annotations

from functools import partial
from statistics import median_low

import torch

from ..build.context import BuildContext
from ..build.feature_sources import ImageFeatures
from ..build.store_spec import StoreSpec
from ..build.texts_by_length import run_together
from .loaded_ranges import LoadedRanges
from .trial_steps import timed


def run_as_built(
    context: BuildContext, spec: StoreSpec, loaded: LoadedRanges, features: list[torch.Tensor]
) -> tuple[list[torch.Tensor], float | None]:
    """Features of the ranges as a build stores them, and seconds of a run in it; None: it is that of an epoch.

    Texts without padding run together, sorted by length; samples whose features are trimmed as wide as the widest.

    Args:
        context: the training.
        spec: the build.
        loaded: the ranges.
        features: of them as an epoch runs them.
    """
    built = ImageFeatures(context.chain, spec.cut, context.source, spec.layout, context.model_inputs)
    if spec.layout.is_token:
        probe = context.source.probe()
        _, seconds = timed(lambda: run_together(built, loaded.rows, loaded.base, probe))
        return features, seconds / len(loaded.rows)
    if not spec.layout.is_trimmed:
        return features, None
    pairs = zip(loaded.stored, loaded.rows, strict=True)
    runs = [timed(partial(built.compute, context.model_inputs(drawn.batch), rows)) for drawn, rows in pairs]
    return [found for found, _ in runs], median_low([seconds for _, seconds in runs])
