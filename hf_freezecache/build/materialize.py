"""Building a store: the frozen prefix runs once over the data set, every process over its own range."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from ..cache.codec import Codec, make_codec
from ..cache.completing import complete, small_files
from ..cache.directories import builders, check_writable, claim_aside, discard_aside, remove_store
from ..cache.fingerprint import digest
from ..cache.holdings import note_owner
from ..cache.manifest import FORMAT_VERSION, Manifest, Shard, StoreError
from ..cache.names import own_input, shard_name
from ..cache.rows import BatchSplit, DrawnBatch, RowError
from ..cache.shards import ShardWriter
from ..cache.store import FeatureStore
from ..cache.view_columns import ViewColumns
from ..distributed import Announcer, Group
from ..model.layout import FeatureLayout
from ..rng import preserve_rng
from ..units import show_bytes
from .errors import BuildFailed, GeometryMisfit, NotWritable, OverLimit
from .feature_sources import ImageFeatures, ViewRun
from .kept_memory import memory_kept
from .one_behind import OneBehind
from .sizing import spec_bytes
from .store_spec import StoreSpec
from .texts_by_length import run_by_length

logger = logging.get_logger(__name__)
T = TypeVar("T")

#: Seconds between two looks at a build of another run.
_POLL_SECONDS = 1.0
#: Ranges whose features the codec is fitted on, spread over the data set, and the most memory they may take.
_FIT_BATCHES, _FIT_BYTES = 8, 2**28
#: Values of a channel, and samples, that are enough to know its distribution.
_FIT_VALUES_PER_CHANNEL, _FIT_ROWS = 2**14, 32
#: Neighbouring ranges of texts that run together, sorted by length, if their features take no more than `_FIT_BYTES`.
_TOGETHER = 16


def open_matching(spec: StoreSpec, group: Group) -> FeatureStore | None:
    """The finished store of this fingerprint, checked to the last byte by the main process; None if there is none.

    A damaged one is deleted and reported: it is built again.

    Raises:
        BuildFailed: if files cannot be read, or not by every process.
    """

    def find() -> tuple[bool, str | None]:
        if not spec.path.exists():
            return False, None
        try:
            store = FeatureStore.open(spec.path)
            if digest(store.manifest.made_from) != spec.path.name:
                raise StoreError(f"{spec.path} holds another store: its manifest does not match its name.")
            _check_is_of(store.manifest, spec)
            return store.verify(), None
        except StoreError as error:
            remove_store(spec.path)
            return False, str(error)

    try:
        exists, problem = group.on_main(find)
        if problem is not None:
            Announcer(group, logger).warning(f"A feature store could not be reused and is built again: {problem}")
        return open_everywhere(spec, group) if exists else None
    except OSError as error:
        raise BuildFailed(str(error)) from error


def _check_is_of(found: Manifest, spec: StoreSpec) -> None:
    """Compares a manifest with that of the store that would be built; what a build settles may differ.

    Raises:
        StoreError: if it describes another store.
    """
    probe = spec.split(spec.source.probe())
    expected = make_manifest(spec, probe, [])
    for name in ("cut", "codec", "layout", "rows", "views", "own_inputs", "inputs", "constants", "lossless"):
        if repr(getattr(found, name)) != repr(getattr(expected, name)):  # as text: NaN is not equal to itself
            raise StoreError(
                f"{spec.path} has another `{name}` than this training's store: {getattr(found, name)} in place of "
                f"{getattr(expected, name)}."
            )


def open_everywhere(spec: StoreSpec, group: Group) -> FeatureStore:
    """The spec's finished store, opened by every process.

    Raises:
        OSError: on every process, if one does not see it.
    """

    def open_here() -> FeatureStore:
        try:
            return FeatureStore.open(spec.path)
        except StoreError as error:
            raise OSError(f"{error} The feature cache directory must be one that all processes see.") from error

    return group.on_all(open_here)


def materialize(spec: StoreSpec, group: Group) -> FeatureStore:
    """Runs the prefix over all samples and writes the store.

    Every process writes the shard of a contiguous range of samples; the main process fits the codec before and
    completes the store after. On CUDA and ROCm, a range of samples is encoded and written while the prefix runs on
    the next one. The bytes do not depend on the number of processes. The random generators are left untouched.

    Where another run is building the same store, this one waits for it and uses what it gets.

    Raises:
        NotWritable: on every process, if nothing can be written to the directory.
        BuildFailed: if some process could not write, or the store that it is made from is damaged; nothing is left
            behind.
        OverLimit: on every process, if the files would take more than `spec.limit`.
        GeometryMisfit: on every process, if some view's geometry cannot be stored as `spec.views` says.
        ValueError: if a feature is not finite (the sample is named) or a batch cannot be stored per row.
    """
    try:
        with preserve_rng():
            need_writable(spec, group)
            store = wait_for_builders(spec, group)
            if store is not None:
                return store
            with memory_kept():
                return _Build(spec, group).run()
    except NotWritable:
        raise
    except (OSError, StoreError) as error:
        raise BuildFailed(str(error)) from error


def wait_for_builders(spec: StoreSpec, group: Group) -> FeatureStore | None:
    """Waits while other runs build the same store.

    Returns:
        What they have built; None if none is building it, or each has failed, was killed or does not go on.
    """
    waits = False
    while others := group.on_main(lambda: builders(spec.path)):
        if not waits:
            Announcer(group, logger).warning(f"Waiting for the feature store {spec.path}, which {others} builds.")
        waits = True
        time.sleep(_POLL_SECONDS)
    return open_matching(spec, group) if waits else None


def claim(spec: StoreSpec, group: Group) -> Path | FeatureStore:
    """Makes the directory in which the store is built; waits while another run builds it.

    Returns:
        The directory; or the store, where another run has finished it meanwhile.

    Raises:
        NotWritable: on every process, if nothing can be written to the directory of the stores.
    """
    need_writable(spec, group)
    while True:
        aside = group.on_main(lambda: claim_aside(spec.path))
        store = open_matching(spec, group) if aside is not None else wait_for_builders(spec, group)
        if store is None and aside is not None:
            return aside
        if store is not None:
            if aside is not None and group.is_main:
                discard_aside(aside)
            return store


def need_writable(spec: StoreSpec, group: Group) -> None:
    """Checks that the store can be written before anything runs for it.

    Raises:
        NotWritable: on every process, if nothing can be written to the directory of the stores.
    """

    def check() -> None:
        try:
            check_writable(spec.directory)
        except OSError as error:
            raise NotWritable(str(error)) from error

    group.on_main(check)


def fit_stride(rows: int, layout: FeatureLayout) -> int:
    """Stride at which features are sampled to fit a codec: enough values per channel to estimate its distribution.

    Args:
        rows: number of features.
        layout: of the features.
    """
    values_per_channel = rows * (layout.values // layout.channels)
    return max(1, min(values_per_channel // _FIT_VALUES_PER_CHANNEL, rows // _FIT_ROWS))


def fit_ranges(spec: StoreSpec) -> list[int]:
    """The ranges whose features a codec is fitted on."""
    ranges = spec.source.num_ranges
    return spread(ranges, max(1, min(_FIT_BATCHES, ranges, _FIT_BYTES // _range_bytes(spec))))


def _range_bytes(spec: StoreSpec) -> int:
    """Memory that the features of a range take, without those of views."""
    return max(1, round(spec.source.batch_size * spec.layout.values * 4 * spec.tokens))


def fit_rows(spec: StoreSpec) -> int:
    """Features that there are in these ranges, those of views included; of texts, of tokens."""
    views_run = spec.views.count if spec.views.needs_features(spec.layout) else 0
    rows = sum(len(spec.source.rows(number)) for number in fit_ranges(spec))
    return round(rows * spec.tokens) * (1 + views_run)


def ranges_run_twice(spec: StoreSpec) -> int:
    """Ranges that a build runs for the codec and again for the shard, as memory does not hold their features."""
    return max(0, len(fit_ranges(spec)) - _FIT_BYTES // (_range_bytes(spec) * (1 + spec.views.count)))


class _Build:
    def __init__(self, spec: StoreSpec, group: Group):
        self.spec, self.group = spec, group
        # Ranges that were run to fit the codec and need not run again.
        self.in_memory: dict[int, list[ViewRun]] = {}

    def run(self) -> FeatureStore:
        spec, group = self.spec, self.group
        codec = make_codec(spec.codec, spec.layout)
        probe = spec.split(spec.source.probe())
        codec.load_tensors(group.on_main(lambda: self._fit(codec)))
        if spec.limit is not None:
            check_limit(spec, group.on_main(lambda: store_bytes(spec, codec, probe, group.size)))
        views = ViewColumns(spec.views, codec)
        mine = group.my_ranges(spec.source.num_ranges)
        self.in_memory = {number: views for number, views in self.in_memory.items() if number in mine}
        aside = claim(spec, group)
        if isinstance(aside, FeatureStore):
            return aside
        try:
            shards = group.gather(group.on_all(lambda: self._write_shard(aside, codec, views, probe)))
            group.on_main(lambda: complete_store(spec, aside, codec, probe, shards))
        except BaseException:
            if group.is_main:
                discard_aside(aside)
            raise
        return open_everywhere(spec, group)

    def _fit(self, codec: Codec) -> dict[str, torch.Tensor]:
        self.in_memory = fit_codec(self.spec, codec)
        return codec.tensors()

    def _write_shard(self, aside: Path, codec: Codec, views: ViewColumns, probe: BatchSplit) -> Shard:
        spec, group = self.spec, self.group
        mine = group.my_ranges(spec.source.num_ranges)
        # Loader processes are forked now, before there is a thread beside this one.
        fresh = _begun(run_views(spec, [number for number in mine if number not in self.in_memory]))
        bar = tqdm(
            total=sum(len(spec.source.rows(number)) for number in mine),
            desc="Building feature store",
            unit=" samples",
            disable=spec.disable_tqdm or not group.is_main,
        )
        path = aside / shard_name(group.rank, group.size)

        def write(number: int, view_runs: list[ViewRun]) -> None:
            rows = spec.source.rows(number)
            codes, inputs = encode_range(spec, codec, views, probe, view_runs, rows)
            writer.write(rows[0], codes, inputs)
            if spec.layout.is_token:  # how many tokens there are is seen only now
                check_limit(spec, writer.bytes)
            bar.set_postfix_str(show_bytes(writer.bytes), refresh=False)
            bar.update(len(rows))

        beside = OneBehind(_waits_for(spec))
        with bar, ShardWriter(path, codec, views, probe.describe(), spec.lossless) as writer, beside:
            for number in mine:
                beside.run(write, number, self.in_memory.pop(number) if number in self.in_memory else next(fresh)[1])
        return writer.shard()


def _waits_for(spec: StoreSpec) -> bool:
    """Whether the host waits for a GPU while the prefix runs, and a thread can follow it in the same stream.

    On a CPU, both would want the same cores; other accelerators have not been tried with two threads.
    """
    return any(parameter.device.type == "cuda" for parameter in spec.chain.model.parameters())


def _begun(runs: Iterator[T]) -> Iterator[T]:
    """The same, of which the first one is made already."""
    return itertools.chain(list(itertools.islice(runs, 1)), runs)


def encode_range(
    spec: StoreSpec,
    codec: Codec,
    views: ViewColumns,
    probe: BatchSplit,
    view_runs: Sequence[ViewRun],
    rows: Sequence[int],
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Codes and model inputs of all views of a range, by column.

    Args:
        spec: of the store.
        codec: fitted.
        views: columns of the augmented views.
        probe: a few rows' model inputs.
        view_runs: the range's views, the base view first.
        rows: the range's row numbers.

    Raises:
        GeometryMisfit: if some view's geometry cannot be stored as `spec.views` says.
        ValueError: if a feature is not finite (the sample is named) or a batch cannot be stored per row.
    """
    base, *others = view_runs
    if not spec.views.whole:
        check_geometry(others, rows)
    check_inputs(base, probe, rows[0])
    codes, inputs = codec.encode(base.need_features(), sample_ids=base.samples_of(rows)), dict(base.columns)
    for view, view_run in enumerate(others, start=1):
        check_inputs(view_run, probe, rows[0])
        codes |= views.encode(view, view_run.features, view_run.geometry, rows)
        if spec.views.own_inputs:
            inputs |= {own_input(view, name): value for name, value in view_run.columns.items()}
    return codes, inputs


def fit_codec(spec: StoreSpec, codec: Codec) -> dict[int, list[ViewRun]]:
    """Fits a codec on features from all over the data set.

    Returns:
        The ranges that were run for it, as far as memory holds them; empty if the codec needs no fit.
    """
    in_memory: dict[int, list[ViewRun]] = {}
    if codec.fitted:
        return in_memory
    sample, every = [], fit_stride(fit_rows(spec), spec.layout)
    for number, views in run_views(spec, fit_ranges(spec)):
        sample += [view.need_features()[::every].clone() for view in views if view.features is not None]
        if (len(in_memory) + 1) * len(views) * _range_bytes(spec) <= _FIT_BYTES:
            in_memory[number] = views
    codec.fit(torch.cat(sample), weights=spec.weights)
    return in_memory


def run_views(spec: StoreSpec, numbers: Sequence[int]) -> Iterator[tuple[int, list[ViewRun]]]:
    """Ranges of samples with the views that the spec stores of them."""
    views, features = spec.views, spec.feature_source
    if spec.layout.is_token and spec.source.rule is None and isinstance(features, ImageFeatures):
        return run_by_length(features, numbers, partial(ranges_together, spec))
    return features.run(numbers, views.count, views.geometry, views.needs_features(spec.layout))


def ranges_together(spec: StoreSpec, number: int) -> list[int]:
    """The ranges of texts that run together with one: those that the codec is fitted on, or its neighbours.

    Args:
        spec: of the store. Nothing else counts, so that the bits are the same whatever processes there are.
        number: of the range.
    """
    fitted = [] if make_codec(spec.codec, spec.layout).fitted else fit_ranges(spec)
    if number in fitted:
        return fitted
    count = max(1, min(_TOGETHER, _FIT_BYTES // _range_bytes(spec)))
    first = number - number % count
    neighbours = range(first, min(first + count, spec.source.num_ranges))
    return [each for each in neighbours if each not in fitted]


def store_bytes(spec: StoreSpec, codec: Codec, probe: BatchSplit, processes: int) -> int:
    """Bytes of all files of the spec's store, to the byte but for digits of numbers that are not known yet.

    Of rows that are packed it counts the most bytes that they can take.

    Args:
        spec: what would be built.
        codec: fitted.
        probe: a few rows' model inputs.
        processes: that would each write a shard.
    """
    total = spec_bytes(spec, codec, probe, processes)
    shards = [Shard(shard_name(rank, processes), len(spec.source), total, "0" * 64) for rank in range(processes)]
    files = small_files(codec, ViewColumns(spec.views, codec), make_manifest(spec, probe, shards), spec.notes)
    return total + sum(len(content) for content in files.values()) + len(spec.owner or "")


def check_limit(spec: StoreSpec, needed: int) -> None:
    """Raises OverLimit if files would take more bytes than `spec.limit`."""
    if spec.limit is not None and needed > spec.limit:
        raise OverLimit(needed, spec.limit)


def complete_store(spec: StoreSpec, aside: Path, codec: Codec, probe: BatchSplit, shards: list[Shard]) -> None:
    """Writes the other files of the spec's store beside the shards in `aside`, and gives the directory its name."""
    views = ViewColumns(spec.views, codec)
    if spec.owner is not None:
        note_owner(aside, spec.owner)
    complete(aside, spec.path, small_files(codec, views, make_manifest(spec, probe, shards), spec.notes))


def make_manifest(spec: StoreSpec, probe: BatchSplit, shards: list[Shard]) -> Manifest:
    """The manifest of the spec's store; its `files` are not filled in yet."""
    channels = spec.views.channels
    return Manifest(
        format_version=FORMAT_VERSION,
        fingerprint=spec.path.name,
        made_from=dict(spec.made_from),
        cut=spec.cut,
        codec=spec.codec,
        layout=spec.layout.to_json(),
        rows=len(spec.source),
        views=spec.views.count,
        geometry=spec.views.geometry,
        sensitive_channels=None if channels is None else channels.tolist(),
        own_inputs=spec.views.own_inputs,
        inputs=probe.describe(),
        constants=probe.constants,
        shards=shards,
        files={},
        lossless=spec.lossless,
    )


def spread(total: int, count: int) -> list[int]:
    """`count` numbers below `total` at equal distances: the first alone, or the first and the last among them."""
    return sorted({round(number * (total - 1) / max(count - 1, 1)) for number in range(count)})


def find_misfit(views: Sequence[ViewRun | DrawnBatch], rows: Sequence[int]) -> str | None:
    """Why the geometry of some view of a range cannot be stored; None if all can."""
    for view in views:
        if view.geometry is None:
            return f"among the samples from {rows[0]} on, {view.refused or 'a transform tells no geometry'}"
        bad = view.geometry.isnan().any(dim=1) if view.geometry.is_floating_point() else None
        if bad is not None and bad.any():
            return f"the geometry of a view of sample {rows[int(bad.int().argmax())]} is not projective"
    return None


def check_geometry(views: Sequence[ViewRun], rows: Sequence[int]) -> None:
    """Raises GeometryMisfit if the geometry of some view of a range cannot be stored."""
    misfit = find_misfit(views, rows)
    if misfit is not None:
        raise GeometryMisfit(misfit)


def check_inputs(inputs: ViewRun | BatchSplit, probe: BatchSplit, first: int) -> None:
    """Compares a batch's model inputs to the probe's.

    Raises:
        RowError: if the entries or the constants differ; `first`, a sample of the batch, is named.
    """
    if inputs.constants != probe.constants:
        raise RowError(
            f"the collator's constants differ between batches: {inputs.constants} at sample {first}, "
            f"{probe.constants} before; only what is the same for all can be replayed."
        )
    if inputs.columns.keys() != probe.columns.keys():
        raise RowError(
            f"the collator returns {sorted(inputs.columns)} at sample {first}, "
            f"but {sorted(probe.columns)} before; a store needs the same entries for all samples."
        )
