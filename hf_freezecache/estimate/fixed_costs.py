"""What a build costs once, however many samples there are: measured, as it decides about small builds."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..augment.channel_map import ChannelMapFit
from ..augment.maps import check_grid
from ..build.context import BuildContext
from ..build.feature_sources import ImageFeatures
from ..build.materialize import materialize
from ..build.store_spec import StoreSpec
from ..cache.rows import ChosenRows, RowSource
from ..cache.view_columns import ViewSpec
from ..distributed import Group
from .trial_steps import timed

#: Unknowns of the linear system that is timed in place of a larger one.
_SOLVED = 768


def small_build_seconds(context: BuildContext, spec: StoreSpec, rows: Sequence[int]) -> float:
    """Seconds of building a store of a few rows: proofs, files that are made durable, manifest, opening.

    The store is built from samples, without views and loader processes, and removed. It is written where the stores
    are if their folder exists, otherwise to the system's folder for temporary files.

    Args:
        context: the training.
        spec: the build.
        rows: row numbers.
    """
    chosen = ChosenRows(spec.source, rows)
    chosen.num_workers = 0
    beside = context.cache_dir if os.access(context.cache_dir, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=beside) as folder:
        small = replace(
            spec,
            source=chosen,
            feature_source=ImageFeatures(context.chain, spec.cut, chosen, spec.layout, context.model_inputs),
            views=ViewSpec(),
            notes={},
            limit=None,
            directory=Path(folder),
            made_from={**spec.made_from, "rows": len(rows)},
            disable_tqdm=True,
        )
        return timed(lambda: materialize(small, Group()))[1]


def worker_start_seconds(source: RowSource, load: float) -> float:
    """Seconds until loader processes have brought their first range, and of their end; 0 without them.

    Args:
        source: the samples.
        load: seconds of loading a range.
    """
    if not source.num_workers:
        return 0.0
    return max(0.0, timed(lambda: list(source.loader([0, 0])))[1] - load)


def solving_seconds(spec: StoreSpec, maps: int) -> float:
    """Seconds of `ChannelMapFit.solve`, from a system that is solved in as many operations a second.

    Args:
        spec: the build.
        maps: number of maps between channels.
    """
    if not maps:
        return 0.0
    channels = spec.layout.channels
    fit = ChannelMapFit(channels, check_grid(spec.layout))
    unknowns = fit.warped_inputs + len(spec.views.warped.channels) + 1
    size, targets = min(unknowns, _SOLVED), min(channels, _SOLVED)
    matrix = torch.eye(size, dtype=torch.float64) + 1 / size
    right = torch.ones(size, targets, dtype=torch.float64)
    torch.linalg.solve(matrix[:8, :8], right[:8])
    _, seconds = timed(lambda: torch.linalg.solve(matrix, right))
    # A map is solved for two halves and for both, and judged with warping alone on either half.
    solved = 3 * (2 / 3 * unknowns**3 + 2 * unknowns**2 * channels) + 4 * 2 * unknowns**2 * channels
    return seconds * maps * solved / (2 / 3 * size**3 + 2 * size**2 * targets)
