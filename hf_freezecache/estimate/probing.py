"""Measuring what a store would cost and save: a few batches go the way of a build and of a replay."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median_low
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from ..augment.channel_map import ChannelMapFit
from ..augment.geometry import PROJECTIVE, cell_centres, decode_geometry, encode_geometry, is_mirrored
from ..augment.maps import check_grid
from ..augment.sensitivity import CHUNK, SensitivityMeter
from ..build.context import BuildContext
from ..build.feature_sources import ImageFeatures, ViewRun, check_shape
from ..build.materialize import find_misfit, fit_rows, fit_stride, ranges_run_twice, spread
from ..build.sizing import spec_bytes
from ..build.store_spec import StoreSpec
from ..cache.codec import Codec, make_codec
from ..cache.names import own_input
from ..cache.rows import BatchSplit, DrawnBatch
from ..cache.shards import ShardStream
from ..cache.shares import SHARE
from ..cache.store import FeatureStore
from ..cache.texts import split_rows
from ..cache.view_columns import ViewColumns, ViewSpec
from ..model.tokens import blank_padding
from ..replay.dataset import choose_views
from ..replay.decode import replay_features
from ..rng import preserve_rng
from .built_features import run_as_built
from .costs import Costs, PlanRow, Work, decide, make_row, overlapped
from .fixed_costs import small_build_seconds, solving_seconds, worker_start_seconds
from .loaded_ranges import LoadedRanges, load_ranges
from .memory_store import store_in_memory
from .pace import LEAST_BUILD_SECONDS, Pace, why_hopeless
from .trial_steps import TrialSteps, timed

#: Of features too large to be compared at once, a few samples are in place of the batch.
_COMPARED_ROWS = 8
#: Declined on one range: what would not pay with so many times the epochs either.
_CLEARLY = 1.25
#: Replays that are timed.
_REPLAYS = 3


class Prober:
    """Measures on a few batches.

    Args:
        context: the training; its chain is traced and proved at the cuts that are asked for.
        steps: how a training step is made, for costs with the suffix.
        step_inputs: selects from a collated batch what such a step takes; what the prefix takes if None.
    """

    def __init__(
        self,
        context: BuildContext,
        steps: TrialSteps | None = None,
        step_inputs: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    ):
        self.context = context
        self.chain, self.source, self.config = context.chain, context.source, context.config
        self.model_inputs, self.processes = context.model_inputs, context.group.size
        self.steps = TrialSteps(self.chain, forward_passes=context.forward_passes) if steps is None else steps
        # Without labels a step takes as long, and a model's own loss need not be the training's.
        self.step_inputs = self.model_inputs if step_inputs is None else step_inputs
        self._loaded: tuple[Any, LoadedRanges] | None = None
        self._split: BatchSplit | None = None
        self._worker_start: float | None = None
        # The kind of store that was found to pay last, and its costs.
        self._accepted: tuple[Any, Costs] | None = None

    def why_hopeless(
        self, spec: StoreSpec, epochs_left: float, pace: Pace | None = None, looks: float = 0.0
    ) -> str | None:
        """Why a build cannot pay, as far as nothing need be measured to see it; None if it may.

        Args:
            spec: the build; its sensitive channels need not be settled.
            epochs_left: epochs of training that remain.
            pace: of the live epochs before; None if there were none.
            looks: ranges that are yet to be drawn to see what is random in them.
        """
        # A build runs texts with less padding than an epoch, or more: by how much must be measured.
        has_widths = spec.layout.is_token or spec.layout.is_trimmed
        from_images = isinstance(spec.feature_source, ImageFeatures) and not has_widths
        return why_hopeless(self.work(spec), epochs_left, from_images, pace, looks)

    def refuse(
        self, spec: StoreSpec, epochs_left: float, limit: int | None, pace: Pace | None = None, looks: float = 0.0
    ) -> tuple[str | None, PlanRow | None]:
        """Decides whether a build pays, with as little measuring as the decision needs.

        What a build costs once is not measured: a build that pays but for it loses no more than that would cost.

        Args:
            spec: the build; its sensitive channels need not be settled.
            epochs_left: epochs of training that remain.
            limit: bytes that the store may take.
            pace: of the live epochs before; None if there were none.
            looks: ranges that are yet to be drawn to see what is random in them.

        Returns:
            None, or why not to build; and what was measured, if anything was. Where measuring broke off because the
            rest could only make the build dearer, the row lacks the rest.
        """
        with preserve_rng():
            try:
                free = self._row(spec, _NOTHING, limit)
                if not free.fits:
                    return decide(free, epochs_left), None
                reason = self.why_hopeless(spec, epochs_left, pace, looks)
                if reason is not None:
                    return reason, None
                return self._refuse(spec, epochs_left, limit, pace, looks)
            finally:
                self._loaded = None

    def _refuse(
        self, spec: StoreSpec, epochs_left: float, limit: int | None, pace: Pace | None, looks: float
    ) -> tuple[str | None, PlanRow]:
        key = _kind(spec)
        if self._accepted is not None and self._accepted[0] == key:
            row = self._row(spec, self._accepted[1], limit)
            return decide(row, epochs_left), row
        # A single range settles what is clear.
        costs = next(self._in_stages(spec, batches=1))
        row = self._row(spec, self._with_least(costs, looks), limit)
        if decide(row, _CLEARLY * epochs_left) is not None:
            return decide(row, epochs_left), row
        for costs in self._in_stages(spec, batches=2):
            row = self._row(spec, self._with_least(costs, looks), limit)
            reason = decide(row, epochs_left)
            if reason is not None:
                return reason, row
        start = self._time_worker_start(costs) if pace is None else pace.start
        costs = self._with_least(replace(costs, fixed=costs.fixed + _passes(spec) * start), looks)
        self._accepted = key, costs
        row = self._row(spec, costs, limit)
        return decide(row, epochs_left), row

    def _with_least(self, costs: Costs, looks: float) -> Costs:
        """The costs with the least that a build takes once, which is not measured to decide."""
        looking = looks * overlapped(0.0, costs.load_base, self.source.num_workers)
        return replace(costs, fixed=costs.fixed + LEAST_BUILD_SECONDS + looking)

    def measure(self, spec: StoreSpec, batches: int = 2, with_suffix: bool = False) -> Costs:
        """What one range costs. Weights, gradients, buffers and generators stay; of what is written nothing is left.

        Args:
            spec: the build; the first channels stand for sensitive ones that are not settled.
            batches: ranges that are loaded; they are kept for the next call.
            with_suffix: also measure training steps on the features, and their memory.
        """
        with preserve_rng():
            *_, costs = self._in_stages(spec, batches, with_suffix, once=True)
            return costs

    def row(self, spec: StoreSpec, costs: Costs, limit: int | None = None) -> PlanRow:
        """What a build would cost and save.

        Args:
            spec: the build.
            costs: what was measured for it.
            limit: bytes that the store may take; None if that is not known.
        """
        with preserve_rng():
            return self._row(spec, costs, limit)

    def work(self, spec: StoreSpec) -> Work:
        """How much a build has to do."""
        views = spec.views
        ranges = len(self.source) / min(self.source.batch_size, len(self.source))
        compared = 0 if views.whole else min(self.config.sensitivity_batches, self.source.num_ranges)
        return Work(
            ranges=ranges,
            views=views.count,
            views_run=views.count if views.needs_features(spec.layout) else 0,
            compared=compared,
            run_twice=0 if make_codec(spec.codec, spec.layout).fitted else ranges_run_twice(spec),
            workers=self.source.num_workers,
            processes=self.processes,
            passes=self.context.forward_passes or 1,
            # Of a node's share, its own processes run as much as all of them would of all rows.
            shared=1.0 if SHARE in spec.made_from else len(spec.source) / len(self.source),
        )

    def plain(self, spec: StoreSpec, batches: int) -> tuple[float, float]:
        """Seconds of a step and of an epoch of plain training, from samples, with nothing frozen.

        Args:
            spec: any build; its samples are taken.
            batches: that are measured.
        """
        with preserve_rng():
            loaded = self._load(spec, batches)
            # An augmented view computes as a base view does.
            inputs = [self.step_inputs(drawn.batch) for drawn in loaded.base]
            computed, _ = self.steps.measure(0, inputs)
            step = overlapped(computed, loaded.live, self.source.num_workers)
            return step, step * self.work(spec).ranges / self.processes

    def load(self, spec: StoreSpec, batches: int) -> list[DrawnBatch]:
        """The augmented views that are probed with."""
        with preserve_rng():
            return self._load(spec, batches).views

    def _row(self, spec: StoreSpec, costs: Costs, limit: int | None) -> PlanRow:
        codec = make_codec(spec.codec, spec.layout)
        if self._split is None:
            self._split = spec.split(spec.source.probe())
        both, base = (
            spec_bytes(spec, codec, self._split, self.processes, views, costs.frame_bytes)
            for views in (spec.views, ViewSpec())
        )
        most = spec_bytes(spec, codec, self._split, self.processes) if spec.lossless else None
        return make_row(
            cut=spec.cut,
            block=self.chain.names[spec.cut - 1],
            codec=spec.codec,
            base_bytes=base,
            view_bytes=both - base,
            costs=costs,
            work=self.work(spec),
            limit=limit,
            most_bytes=most,
        )

    def _in_stages(self, spec: StoreSpec, batches: int, with_suffix: bool = False, once: bool = False):
        """Yields costs of which each has more in it: what is added can only speak against the build.

        But for the suffix: it comes first, where loader processes may be what a live epoch waits for.

        Args:
            spec: the build.
            batches: ranges that are loaded.
            with_suffix: also measure training steps.
            once: also measure what a build costs once, by one of these ranges.
        """
        loaded = self._load(spec, batches)
        features, of_views, prefix = self._run_prefix(spec, loaded)
        stored, together = run_as_built(self.context, spec, loaded, features)
        costs = Costs(
            load=loaded.live,
            prefix=prefix,
            prefix_build=together,
            load_base=median_low(loaded.base_seconds),
            load_view=median_low(loaded.view_seconds) if loaded.view_seconds else 0.0,
            run=None if isinstance(spec.feature_source, ImageFeatures) else self._time_runs(spec, batches),
        )
        workers = self.source.num_workers
        # One process alone cannot run what the processes of a training normalize together.
        alone = self.processes == 1 or not any(isinstance(m, nn.SyncBatchNorm) for m in self.chain.model.modules())
        if with_suffix or (workers and alone and costs.load / workers > prefix):
            inputs = [self.step_inputs(drawn.batch) for drawn in loaded.base]
            count = len(inputs) if with_suffix else 1
            suffix, peak = self.steps.measure(spec.cut, inputs[:count], features[:count])
            costs = replace(costs, suffix=suffix, peak_memory_bytes=peak)
        yield costs
        codec = make_codec(spec.codec, spec.layout)
        fits = not codec.fitted
        pooled = [*(run.need_features() for run in stored), *of_views]
        fitting, fitted_here = self._fit(spec, codec, pooled) if fits else (0.0, 0.0)
        store, encode = self._encode(spec, codec, loaded, stored, of_views)
        read, decode = self._time_replay(store)
        if spec.layout.is_token or spec.layout.is_trimmed:  # the samples are collated in a replay, too
            read += costs.load
        packed = store.frame_bytes() if spec.lossless else None
        costs = replace(costs, encode=encode, read=read, decode=decode, fixed=fitting, frame_bytes=packed)
        yield costs
        if not spec.views.whole:
            compare = self._time_comparison(spec, loaded, features, of_views)
            solving = solving_seconds(spec, self._count_maps(spec, loaded))
            costs = replace(costs, compare=compare, fixed=costs.fixed + solving)
            yield costs
        if once:
            ranges = len(loaded.rows) * (costs.load_base + costs.build_prefix + costs.encode)
            small_build = small_build_seconds(self.context, spec, [row for rows in loaded.rows for row in rows])
            starting = _passes(spec) * self._time_worker_start(costs)
            yield replace(costs, fixed=costs.fixed + max(0.0, small_build - fitted_here - ranges) + starting)

    # What a range costs, step by step

    def _load(self, spec: StoreSpec, batches: int) -> LoadedRanges:
        views = spec.views
        geometry = None if views.whole else (views.warped.geometry, check_grid(spec.layout))
        wide = None if spec.source.rule is None else spec.source
        key = (batches, bool(views.count), geometry, wide)
        if self._loaded is not None and self._loaded[0] == key:
            return self._loaded[1]
        # Whole views are drawn as in a live epoch. Where there is none, and none was turned off, nothing is random.
        as_views = geometry is not None or not self.config.views
        loaded = load_ranges(self.source, batches, bool(views.count), geometry, as_views, wide)
        self._loaded = key, loaded
        return loaded

    def _run_prefix(
        self, spec: StoreSpec, loaded: LoadedRanges
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], float]:
        """Features of the base views and of the augmented views, and seconds of a run.

        Raises:
            ValueError: if the features have several sizes.
        """

        def run(drawn: DrawnBatch) -> torch.Tensor:
            features = self.chain.prefix(self.model_inputs(drawn.batch), spec.cut)
            is_text = spec.layout.is_token and spec.source.rule is None
            mask = spec.split(drawn.batch).mask if is_text else None
            return features if mask is None else blank_padding(features, mask)

        run(loaded.base[0])
        base: list[torch.Tensor] = []
        of_views: list[torch.Tensor] = []
        seconds = []
        for computed, batches in ((base, loaded.base), (of_views, loaded.views)):
            for rows, drawn in zip(loaded.rows, batches, strict=False):
                features, spent = timed(partial(run, drawn))
                if spec.source.rule is None:
                    check_shape(features, spec.layout, rows)
                computed.append(features)
                seconds.append(spent)
        return base, of_views, median_low(seconds)

    def _time_runs(self, spec: StoreSpec, batches: int) -> float:
        """Seconds of a range that does not come from samples; the first of the ranges warms up."""
        views, seconds = spec.views, []
        for number in [0, *spread(max(1, self.source.num_ranges - 1), batches)]:
            own = views.needs_features(spec.layout)

            def run(number=number, own=own):
                return list(spec.feature_source.run([number], views.count, views.geometry, own))

            seconds.append(timed(run)[1])
        return median_low(seconds[1:])

    def _time_worker_start(self, costs: Costs) -> float:
        if self._worker_start is None:
            self._worker_start = worker_start_seconds(self.source, costs.load_base)
        return self._worker_start

    def _fit(self, spec: StoreSpec, codec: Codec, features: list[torch.Tensor]) -> tuple[float, float]:
        """Fits the codec; seconds that it takes on as many rows as a build fits it on, and on these."""
        rows = fit_rows(spec)
        stride = fit_stride(rows, spec.layout)
        fitted_rows, pooled = -(-rows // stride), torch.cat(features)
        pooled = pooled[:: max(1, len(pooled) // fitted_rows)]
        _, seconds = timed(lambda: codec.fit(pooled))
        return seconds * max(1.0, fitted_rows / len(pooled)), seconds

    def _encode(
        self,
        spec: StoreSpec,
        codec: Codec,
        loaded: LoadedRanges,
        stored: list[ViewRun],
        of_views: list[torch.Tensor],
    ) -> tuple[FeatureStore, float]:
        """A store of these ranges in memory, and the seconds that one range took."""
        views = ViewColumns(self._standing_for(spec, loaded), codec)
        split = spec.split(loaded.stored[0].batch)
        sink, seconds = pa.BufferOutputStream(), []
        stream = ShardStream(sink, codec, views, split.describe(), spec.lossless)
        for place, (rows, run) in enumerate(zip(loaded.rows, stored, strict=True)):
            geometry = _geometry(spec, loaded.views[place], rows) if loaded.views and not spec.views.whole else None
            view_features = of_views[place] if of_views else None

            def write(rows=rows, run=run, geometry=geometry, view_features=view_features):
                codes = codec.encode(run.need_features(), sample_ids=run.samples_of(rows))
                inputs = dict(run.columns)
                for view in range(1, spec.views.count + 1):
                    codes |= views.encode(view, view_features, geometry, rows)
                    if spec.views.own_inputs:
                        inputs |= {own_input(view, name): value for name, value in run.columns.items()}
                stream.write(rows[0], codes, inputs)

            seconds.append(timed(write)[1])
        stream.close()
        buffer = sink.getvalue()
        _, hashing = timed(lambda: hashlib.sha256(buffer).hexdigest())
        store = store_in_memory(spec, codec, views, split, stream.rows, buffer)
        return store, median_low(seconds) + hashing / len(loaded.rows)

    def _count_maps(self, spec: StoreSpec, loaded: LoadedRanges) -> int:
        """Maps between channels that will be fitted: for mirrored views, for the others, or for both."""
        if spec.views.whole or not self.config.channel_map:
            return 0
        layout, grid = spec.layout, check_grid(spec.layout)
        kind, channels, _ = spec.views.warped
        geometry = torch.cat([_geometry(spec, *drawn) for drawn in zip(loaded.views, loaded.rows, strict=True)])
        mirrored = is_mirrored(decode_geometry(geometry, kind, grid)).float().mean().item()
        at_once = min(max(1, CHUNK // (layout.channels * layout.positions)), len(loaded.rows[0]))
        updates = self.work(spec).compared * -(-len(loaded.rows[0]) // at_once)
        fit = ChannelMapFit(layout.channels, grid)
        return sum(
            fit.will_fit(len(channels), share * at_once * layout.positions, updates)
            for share in (mirrored, 1 - mirrored)
        )

    def _standing_for(self, spec: StoreSpec, loaded: LoadedRanges) -> ViewSpec:
        """The views, with a linear map between channels of the right size where there may be one."""
        views, layout = spec.views, spec.layout
        if views.channel_maps is not None or not self._count_maps(spec, loaded):
            return views
        fit = ChannelMapFit(layout.channels, check_grid(layout))
        inputs = fit.warped_inputs + len(views.warped.channels) + 1
        generator = torch.Generator().manual_seed(0)
        maps = torch.randn(2, inputs, layout.channels, generator=generator) / inputs
        return replace(views, channel_maps=maps, limits=torch.tensor([[-1.0], [1.0]]).expand(2, layout.channels))

    def _time_replay(self, store: FeatureStore) -> tuple[float, float]:
        """Seconds of reading random rows, and of turning them into features on the device."""
        rows, device = min(self.source.batch_size, len(store)), self.context.device
        reading, decoding = [], []
        for epoch in range(_REPLAYS + 1):
            order = np.random.default_rng(epoch).permutation(len(store))[:rows]

            def read(order=order, epoch=epoch):
                views = choose_views(self.source.seed, epoch, order.tolist(), store.manifest.views)
                return store.read_rows(order, views)

            batch, seconds = timed(read)
            reading.append(seconds)
            is_text = store.codec.layout.is_token
            codes = split_rows(batch) if is_text else {name: batch[name] for name in store.code_names(batch)}

            def decode(codes=codes):
                return replay_features(store, on_device(codes, device))

            with torch.no_grad():
                _, seconds = timed(decode)
            decoding.append(seconds)
        return median_low(reading[1:]), median_low(decoding[1:])

    def _time_comparison(
        self, spec: StoreSpec, loaded: LoadedRanges, features: list[torch.Tensor], of_views: list[torch.Tensor]
    ) -> float:
        base, view, rows = features[0], of_views[0], loaded.rows[0]
        count = len(base) if base.numel() <= CHUNK else min(len(base), _COMPARED_ROWS)
        geometry = _geometry(spec, loaded.views[0], rows)[:count].to(base.device)
        sources = decode_geometry(geometry, spec.views.warped.geometry, check_grid(spec.layout))
        meter = SensitivityMeter(spec.layout, self.config.similarity)

        def compare():
            meter.update(base[:count], view[:count], sources, rows[:count])

        compare()
        return timed(compare)[1] * len(base) / count


_NOTHING = Costs(load=0.0, prefix=0.0, load_base=0.0)


def _passes(spec: StoreSpec) -> int:
    """How often a build goes through samples, each time with loader processes that start."""
    return 1 + (not make_codec(spec.codec, spec.layout).fitted) + (not spec.views.whole)


def _kind(spec: StoreSpec) -> tuple[Any, ...]:
    """What a store costs and saves depends on, besides the training."""
    views = spec.views
    channels = None if views.channels is None else len(views.channels)
    return spec.cut, spec.codec, views.count, views.geometry, channels, type(spec.feature_source)


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors moved."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def _geometry(spec: StoreSpec, drawn: DrawnBatch, rows: Sequence[int]) -> torch.Tensor:
    """A view's geometry; that of a view that shows all of its base view, where it cannot be told."""
    kind, grid = spec.views.warped.geometry, check_grid(spec.layout)
    if drawn.geometry is not None and find_misfit([drawn], rows) is None:
        return drawn.geometry
    if kind == PROJECTIVE:
        row = torch.eye(3).flatten()[:8]
    else:
        row = encode_geometry(cell_centres(grid), kind, grid, 1.0)
    return row.repeat(len(rows), 1)
