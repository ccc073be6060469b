"""What of the samples is random, and how the views of it are kept: settled before a store is built."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from ..cache.codec import make_codec
from ..cache.materialize import BuildPlan, GeometryMisfit, channel_bytes, find_misfit, view_features
from ..cache.rows import RowSource
from ..cache.views import ViewSpec
from ..geometry import PROJECTIVE, decode_geometry
from ..layout import FeatureLayout
from .sensitivity import SENSITIVITY, Sensitivity, SensitivityMeter


@dataclass(frozen=True)
class Augmentation:
    """What is random in the samples as the trainer gets them.

    Args:
        random: whether anything is.
        replayable: whether it can be replayed from the base view, by its geometry.
        why_not: why it cannot.
        own_inputs: whether model inputs besides the main one (labels) may be drawn too.
    """

    random: bool = False
    replayable: bool = False
    why_not: str | None = None
    own_inputs: bool = False


def survey(source: RowSource) -> Augmentation:
    """Draws a few rows several times and looks what changes."""
    if not source.is_random():
        return Augmentation()
    rows = range(min(8, len(source)))
    probes = [source.draw(rows, view, geometry=(PROJECTIVE, (1, 1))) for view in range(1, 5)]
    refused = next((probe.refused for probe in probes if probe.refused is not None), None)
    if refused is None and any(probe.geometry is None for probe in probes):
        return Augmentation(True, why_not="the random transform is not a `ReplayableTransform`", own_inputs=True)
    if source.is_random_besides():
        return Augmentation(True, why_not="the data collator is random, or not only the transform", own_inputs=True)
    return Augmentation(True, refused is None, refused)


def make_view_spec(
    augmentation: Augmentation,
    layout: FeatureLayout,
    views: int,
    sensitive_channels: int,
    geometry: str = PROJECTIVE,
) -> ViewSpec:
    """What will be kept of the views, before the channels are known: the first ones stand for them.

    Args:
        augmentation: what `survey` found.
        layout: of the features.
        views: augmented views wanted.
        sensitive_channels: how many channels to keep of each.
        geometry: kind in which the geometry is kept.
    """
    if not augmentation.random or not views:
        return ViewSpec()
    if not augmentation.replayable or layout.grid is None or sensitive_channels == layout.channels:
        return ViewSpec(views, own_inputs=augmentation.own_inputs)
    return ViewSpec(views, geometry, torch.arange(sensitive_channels), torch.zeros(layout.channels))


def count_sensitive(
    codec: str, layout: FeatureLayout, rows: int, views: int, fraction: float, budget: int | None
) -> int:
    """How many channels to keep of every view.

    Args:
        codec: name of the codec.
        layout: of the features.
        rows: samples.
        views: augmented views.
        fraction: of the channels (the paper's gamma), where there is no budget.
        budget: bytes that the sensitive channels of all views of all samples may take; special tokens and geometry
            come on top.
    """
    if budget is None:
        return round(fraction * layout.channels)
    made = make_codec(codec, layout)
    fitting = (k for k in range(layout.channels, 0, -1) if rows * views * channel_bytes(made, k) <= budget)
    return next(fitting, 0)


def choose_channels(plan: BuildPlan, similarity: str, batches: int) -> BuildPlan:
    """Measures which channels do not follow the augmentation, and completes the plan with them.

    Args:
        plan: whose `views` say how many channels are wanted.
        similarity: how the true features of a view and the warped ones of its base view are compared.
        batches: ranges of samples, drawn from the seed, that are compared at most.

    Raises:
        GeometryMisfit: if a view's geometry cannot be kept as the plan says.
    """
    if plan.views.whole:
        return plan
    measured = measure_sensitivity(plan, similarity, batches)
    spec = replace(
        plan.views, channels=measured.choose(len(plan.views.channels)), outside=measured.outside.to(torch.float32)
    )
    return replace(plan, views=spec, notes={**plan.notes, SENSITIVITY: measured.tensors()})


def measure_sensitivity(plan: BuildPlan, similarity: str, batches: int) -> Sensitivity:
    """Similarity of every channel over a sample of the data; see `choose_channels`."""
    source, kind, grid = plan.source, plan.views.geometry, plan.layout.grid
    count = min(batches, source.num_batches)
    chosen = np.random.default_rng(source.seed).choice(source.num_batches, count, replace=False)
    meter = SensitivityMeter(plan.layout, similarity)
    for number, (base, view) in source.loader(sorted(chosen.tolist()), views=1, geometry=(kind, grid)):
        rows = source.rows(number)
        misfit = find_misfit([view.geometry], rows)
        if misfit is not None:
            raise GeometryMisfit(misfit)
        features = [view_features(plan, drawn, rows[0]) for drawn in (base, view)]
        sources = decode_geometry(view.geometry.to(features[0].device), kind, grid)
        meter.update(*features, sources, rows)
    return meter.result()
