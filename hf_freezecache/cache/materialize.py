"""Building a store: the frozen prefix runs once over the data set, every process over its own range."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from ..chain import BlockChain
from ..distributed import Group
from ..layout import FeatureLayout
from ..rng import preserve_rng
from .codec import Codec, make_codec
from .fingerprint import digest
from .rows import BatchSplit, DrawnBatch, RowSource, split_batch
from .store import (
    FORMAT_VERSION,
    FeatureStore,
    Manifest,
    Shard,
    ShardWriter,
    StoreError,
    complete,
    create_aside,
    own_input,
    shard_name,
)
from .views import ViewColumns, ViewSpec

logger = logging.get_logger(__name__)

#: Ranges whose features the codec is fitted on, spread over the data set, and the most memory they may take.
_FIT_BATCHES, _FIT_BYTES = 8, 2**28
#: Values of a channel, and samples, that are enough to know its distribution.
_FIT_VALUES_PER_CHANNEL, _FIT_ROWS = 2**14, 32


class BuildFailed(OSError):
    """A store could not be written (full disk, missing permission). Training can go on without it."""


class GeometryMisfit(ValueError):
    """A view's geometry cannot be kept in the chosen way; the message says why.

    Args:
        reason: the message.
        for_all_kinds: whether no other kind of geometry would do either.
    """

    def __init__(self, reason: str, for_all_kinds: bool = False):
        super().__init__(reason)
        self.for_all_kinds = for_all_kinds


@dataclass(frozen=True)
class BuildPlan:
    """What to build.

    Args:
        chain: the model, traced and proved at `cut`.
        cut: frozen blocks.
        source: the samples.
        codec: name of the codec.
        layout: the feature as the prefix returns it in this training (mixed precision included).
        made_from: the fingerprint's inputs, the main process's on every process.
        directory: where stores lie.
        model_inputs: of a collated batch, what the model takes, moved to where the model is.
        disable_tqdm: no progress bar.
        views: which augmented views to keep, and what of them.
        notes: tensors for people and tools that lie beside the shards, by file name without `.safetensors`.
    """

    chain: BlockChain
    cut: int
    source: RowSource
    codec: str
    layout: FeatureLayout
    made_from: Mapping[str, Any]
    directory: Path
    model_inputs: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    disable_tqdm: bool = False
    views: ViewSpec = field(default_factory=ViewSpec)
    notes: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """Where the finished store lies."""
        return self.directory / digest(self.made_from)


def estimate_bytes(plan: BuildPlan) -> int:
    """Bytes of the Arrow files that the plan would write, from the sizes of rows and one probe row's inputs."""
    split = split_batch(plan.source.probe(), plan.chain.main_input)
    codec = make_codec(plan.codec, plan.layout)
    per_row = codec.row_bytes + ViewColumns(plan.views, codec).row_bytes + 8
    for value in split.columns.values():
        row = value[0]
        own = row.numel() * row.element_size() if isinstance(row, torch.Tensor) else len(str(row)) + 8
        per_row += own * (1 + plan.views.count if plan.views.own_inputs else 1)
    return per_row * len(plan.source)


def view_features(plan: BuildPlan, drawn: DrawnBatch, first: int) -> torch.Tensor:
    """Runs the prefix on one view of a range.

    Args:
        plan: what is built.
        drawn: the view.
        first: its first sample, for error messages.

    Returns:
        Features `(B, *layout.shape)`.

    Raises:
        ValueError: if the feature has another size than the probe's.
    """
    features = plan.chain.prefix(plan.model_inputs(drawn.batch), plan.cut)
    if tuple(features.shape[1:]) != plan.layout.shape:
        raise ValueError(
            f"the feature of sample {first} and those after it has shape {tuple(features.shape[1:])} instead "
            f"of {plan.layout.shape}: a store needs inputs of one size. Resize them, or use cache='never'."
        )
    return features


def open_matching(plan: BuildPlan, group: Group) -> FeatureStore | None:
    """The finished store of this fingerprint, checked to the last byte by the main process; None if there is none.

    A damaged one is taken away and reported: it is built again.

    Raises:
        BuildFailed: if files cannot be read, or not by every process.
    """

    def find() -> tuple[bool, str | None]:
        if not plan.path.exists():
            return False, None
        try:
            store = FeatureStore.open(plan.path)
            if not store.manifest.fingerprint == digest(store.manifest.made_from) == plan.path.name:
                raise StoreError(f"{plan.path} holds another store: its manifest does not match its name.")
            return store.verify(), None
        except StoreError as error:
            shutil.rmtree(plan.path)
            return False, str(error)

    try:
        found, problem = group.on_main(find)
        if problem is not None and group.rank == 0:
            logger.warning(f"A feature store could not be reused and is built again: {problem}")
        return _open_everywhere(plan, group) if found else None
    except OSError as error:
        raise BuildFailed(str(error)) from error


def _open_everywhere(plan: BuildPlan, group: Group) -> FeatureStore:
    def open_here() -> FeatureStore:
        try:
            return FeatureStore.open(plan.path)
        except StoreError as error:
            raise OSError(f"{error} The feature cache directory must be one that all processes see.") from error

    return group.locally(open_here)


def materialize(plan: BuildPlan, group: Group) -> FeatureStore:
    """Runs the prefix over all samples and writes the store.

    Every process writes the shard of a contiguous range of samples; the main process fits the codec before and
    completes the store after. The bytes do not depend on the number of processes. The random generators are left
    untouched.

    Raises:
        BuildFailed: if some process could not write; nothing is left behind.
        GeometryMisfit: on every process, if some view's geometry cannot be kept as `plan.views` says.
        ValueError: if a feature is not finite (the sample is named) or a batch cannot be kept per row.
    """
    try:
        with preserve_rng():
            return _Build(plan, group).run()
    except OSError as error:
        raise BuildFailed(str(error)) from error


def fit_stride(rows: int, layout: FeatureLayout) -> int:
    """Of how many features one is enough for a codec to know every channel's distribution.

    Args:
        rows: features there are.
        layout: theirs.
    """
    values_per_channel = rows * (layout.values // layout.channels)
    return max(1, min(values_per_channel // _FIT_VALUES_PER_CHANNEL, rows // _FIT_ROWS))


@dataclass(frozen=True)
class _Ran:
    """One view of a range: what the prefix made of it, and what goes to the store besides."""

    columns: dict[str, Any]
    constants: dict[str, Any]
    features: torch.Tensor | None
    drawn: DrawnBatch


class _Build:
    def __init__(self, plan: BuildPlan, group: Group):
        self.plan, self.group = plan, group
        self.kept: dict[int, list[_Ran]] = {}

    def run(self) -> FeatureStore:
        plan, group = self.plan, self.group
        codec = make_codec(plan.codec, plan.layout)
        probe = split_batch(plan.source.probe(), plan.chain.main_input)
        codec.load_tensors(group.on_main(lambda: self._fit(codec)))
        views = ViewColumns(plan.views, codec)
        mine = group.share(plan.source.num_batches)
        self.kept = {number: batch for number, batch in self.kept.items() if number in mine}
        aside = group.on_main(lambda: create_aside(plan.path))
        try:
            shards = group.together(lambda: self._write_shard(aside, codec, views, probe))
            misfits = [shard for shard in shards if isinstance(shard, str)]
            if misfits:
                raise GeometryMisfit(misfits[0])
            group.on_main(lambda: self._complete(aside, codec, views, probe, shards))
        except BaseException:
            if group.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise
        return _open_everywhere(plan, group)

    def _fit(self, codec: Codec) -> dict[str, torch.Tensor]:
        """Fits on features from all over the data set; what memory holds is kept, so as not to run twice."""
        if codec.fitted:
            return codec.tensors()
        source, layout = self.plan.source, self.plan.layout
        batch_bytes = source.batch_size * layout.values * 4
        count = max(1, min(_FIT_BATCHES, source.num_batches, _FIT_BYTES // batch_bytes))
        numbers = spread(source.num_batches, count)
        views_run = self.plan.views.count if self.plan.views.needs_features(layout) else 0
        rows = sum(len(source.rows(number)) for number in numbers) * (1 + views_run)
        sample, every = [], fit_stride(rows, layout)
        for number, views in self._run_prefix(numbers):
            sample += [view.features[::every].clone() for view in views if view.features is not None]
            if (len(self.kept) + 1) * len(views) * batch_bytes <= _FIT_BYTES:
                self.kept[number] = views
        return codec.fit(torch.cat(sample)).tensors()

    def _run_prefix(self, numbers: list[int]) -> Iterator[tuple[int, list[_Ran]]]:
        plan = self.plan
        for number, views in plan.source.loader(numbers, plan.views.count, self._wanted_geometry):
            first, ran = plan.source.rows(number)[0], []
            for view, drawn in enumerate(views):
                split = split_batch(drawn.batch, plan.chain.main_input)
                needed = view == 0 or plan.views.needs_features(plan.layout)
                features = view_features(plan, drawn, first) if needed else None
                # The images are not needed any more.
                ran.append(_Ran(split.columns, split.constants, features, replace(drawn, batch={})))
            yield number, ran

    @property
    def _wanted_geometry(self) -> tuple[str, tuple[int, int]] | None:
        return None if self.plan.views.whole else (self.plan.views.geometry, self.plan.layout.grid)

    def _write_shard(self, aside: Path, codec: Codec, views: ViewColumns, probe: BatchSplit) -> Shard | str:
        """Returns the finished shard; why it cannot be written, if a view's geometry does not fit."""
        plan, group = self.plan, self.group
        mine = group.share(plan.source.num_batches)
        fresh = self._run_prefix([number for number in mine if number not in self.kept])
        bar = tqdm(total=len(mine), desc="Building feature store", disable=plan.disable_tqdm or group.rank != 0)
        path = aside / shard_name(group.rank, group.size)
        with bar, ShardWriter(path, codec, views, probe.describe()) as writer:
            for number in mine:
                base, *others = self.kept.pop(number) if number in self.kept else next(fresh)[1]
                rows = plan.source.rows(number)
                misfit = None if plan.views.whole else find_misfit([view.drawn for view in others], rows)
                if misfit is not None:
                    return misfit
                _check_inputs(base, probe, rows[0])
                codes, inputs = codec.encode(base.features, sample_ids=rows), dict(base.columns)
                for view, ran in enumerate(others, start=1):
                    _check_inputs(ran, probe, rows[0])
                    codes |= views.encode(view, ran.features, ran.drawn.geometry, rows)
                    if plan.views.own_inputs:
                        inputs |= {own_input(view, name): value for name, value in ran.columns.items()}
                writer.write(rows[0], codes, inputs)
                bar.update()
        return writer.shard()

    def _complete(self, aside: Path, codec: Codec, views: ViewColumns, probe: BatchSplit, shards: list[Shard]) -> None:
        plan = self.plan
        channels = plan.views.channels
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            fingerprint=plan.path.name,
            made_from=dict(plan.made_from),
            cut=plan.cut,
            codec=plan.codec,
            layout=plan.layout.to_json(),
            rows=len(plan.source),
            views=plan.views.count,
            geometry=plan.views.geometry,
            sensitive_channels=None if channels is None else channels.tolist(),
            own_inputs=plan.views.own_inputs,
            inputs=probe.describe(),
            constants=probe.constants,
            shards=shards,
            files={},
        )
        complete(aside, plan.path, codec, views, manifest, plan.notes)


def spread(total: int, count: int) -> list[int]:
    """`count` numbers below `total` at equal distances: the first alone, or the first and the last among them."""
    return sorted({round(number * (total - 1) / max(count - 1, 1)) for number in range(count)})


def find_misfit(views: Sequence[DrawnBatch], rows: Sequence[int]) -> str | None:
    """Why the geometry of some view of a range cannot be kept; None if all can."""
    for drawn in views:
        if drawn.geometry is None:
            return f"among the samples from {rows[0]} on, {drawn.refused or 'a transform tells no geometry'}"
        bad = drawn.geometry.isnan().any(dim=1) if drawn.geometry.is_floating_point() else None
        if bad is not None and bad.any():
            return f"the geometry of a view of sample {rows[int(bad.int().argmax())]} is not projective"
    return None


def _check_inputs(ran: _Ran, probe: BatchSplit, first: int) -> None:
    if ran.constants != probe.constants:
        raise ValueError(
            f"the collator's constants differ between batches: {ran.constants} at sample {first}, "
            f"{probe.constants} before; only what is the same for all can be replayed."
        )
    if ran.columns.keys() != probe.columns.keys():
        raise ValueError(
            f"the collator returns {sorted(ran.columns)} at sample {first}, "
            f"but {sorted(probe.columns)} before; a store needs the same entries for all samples."
        )
