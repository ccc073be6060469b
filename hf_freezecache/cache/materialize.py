"""Building a store: the frozen prefix runs once over the data set, every process over its own range."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from ..chain import BlockChain
from ..distributed import Group
from ..geometry import geometry_column
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
    """A view's geometry cannot be kept in the chosen way; the message says why."""


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
    per_row = codec.row_bytes + _views_row_bytes(plan.views, codec) + 8
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


def fit_sample(batches: Sequence[torch.Tensor], layout: FeatureLayout) -> torch.Tensor:
    """As many features, evenly from all batches, as a codec needs to know every channel's distribution.

    Args:
        batches: features `(B, *layout.shape)` each.
        layout: theirs.

    Returns:
        `(n, *layout.shape)` tensor.
    """
    rows = sum(len(features) for features in batches)
    values_per_channel = rows * (layout.values // layout.channels)
    every = max(1, min(values_per_channel // _FIT_VALUES_PER_CHANNEL, rows // _FIT_ROWS))
    return torch.cat([features[::every] for features in batches])


@dataclass(frozen=True)
class _Encoded:
    """One view of a range: what the prefix made of it, and what goes to the store besides."""

    split: BatchSplit
    features: torch.Tensor
    geometry: torch.Tensor | None


class _Build:
    def __init__(self, plan: BuildPlan, group: Group):
        self.plan, self.group = plan, group
        self.kept: dict[int, list[_Encoded]] = {}

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
        """Fits on features from all over the data set; they are kept, so that their ranges do not run twice."""
        if codec.fitted:
            return codec.tensors()
        source = self.plan.source
        batch_bytes = source.batch_size * self.plan.layout.values * 4 * (1 + self.plan.views.count)
        count = max(1, min(_FIT_BATCHES, source.num_batches, _FIT_BYTES // batch_bytes))
        for number, views in self._encoded(spread(source.num_batches, count)):
            self.kept[number] = views
        features = [view.features for views in self.kept.values() for view in views]
        return codec.fit(fit_sample(features, self.plan.layout)).tensors()

    def _encoded(self, numbers: list[int]) -> Iterator[tuple[int, list[_Encoded]]]:
        plan = self.plan
        for number, views in plan.source.loader(numbers, plan.views.count, self._wanted_geometry):
            first = plan.source.rows(number)[0]
            yield (
                number,
                [
                    _Encoded(
                        split_batch(drawn.batch, plan.chain.main_input),
                        view_features(plan, drawn, first),
                        drawn.geometry,
                    )
                    for drawn in views
                ],
            )

    @property
    def _wanted_geometry(self) -> tuple[str, tuple[int, int]] | None:
        return None if self.plan.views.whole else (self.plan.views.geometry, self.plan.layout.grid)

    def _write_shard(self, aside: Path, codec: Codec, views: ViewColumns, probe: BatchSplit) -> Shard | str:
        """Returns the finished shard; why it cannot be written, if a view's geometry does not fit."""
        plan, group = self.plan, self.group
        mine = group.share(plan.source.num_batches)
        fresh = self._encoded([number for number in mine if number not in self.kept])
        bar = tqdm(total=len(mine), desc="Building feature store", disable=plan.disable_tqdm or group.rank != 0)
        path = aside / shard_name(group.rank, group.size)
        with bar, ShardWriter(path, codec, views, probe.describe()) as writer:
            for number in mine:
                drawn = self.kept.pop(number) if number in self.kept else next(fresh)[1]
                rows = plan.source.rows(number)
                misfit = None if plan.views.whole else find_misfit([view.geometry for view in drawn[1:]], rows)
                if misfit is not None:
                    return misfit
                codes, inputs = codec.encode(drawn[0].features, sample_ids=rows), dict(drawn[0].split.columns)
                for number_of_view, view in enumerate(drawn):
                    _check_inputs(view.split, probe, rows[0])
                    if number_of_view:
                        codes |= views.encode(number_of_view, view.features, view.geometry, rows)
                    if number_of_view and plan.views.own_inputs:
                        own = view.split.columns.items()
                        inputs |= {own_input(number_of_view, name): value for name, value in own}
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
    """`count` numbers below `total` at equal distances, the first and the last among them."""
    return sorted({round(number * (total - 1) / max(count - 1, 1)) for number in range(count)})


def find_misfit(geometries: Sequence[torch.Tensor | None], rows: Sequence[int]) -> str | None:
    """Why a view's geometry cannot be kept; None if all can."""
    for geometry in geometries:
        if geometry is None:
            return f"a transform cannot tell what it did to the samples from {rows[0]} on"
        bad = geometry.isnan().any(dim=1) if geometry.is_floating_point() else None
        if bad is not None and bad.any():
            return f"the geometry of a view of sample {rows[int(bad.int().argmax())]} is not projective"
    return None


def _check_inputs(split: BatchSplit, probe: BatchSplit, first: int) -> None:
    if split.constants != probe.constants:
        raise ValueError(
            f"the collator's constants differ between batches: {split.constants} at sample {first}, "
            f"{probe.constants} before; only what is the same for all can be replayed."
        )
    if split.columns.keys() != probe.columns.keys():
        raise ValueError(
            f"the collator returns {sorted(split.columns)} at sample {first}, "
            f"but {sorted(probe.columns)} before; a store needs the same entries for all samples."
        )


def _views_row_bytes(spec: ViewSpec, codec: Codec) -> int:
    if not spec.count:
        return 0
    if spec.whole:
        return spec.count * codec.row_bytes
    special = codec.for_special_tokens().row_bytes if codec.layout.special_tokens else 0
    dtype, length = geometry_column(spec.geometry, codec.layout.grid)
    return spec.count * (channel_bytes(codec, len(spec.channels)) + special + dtype.itemsize * length)


def channel_bytes(codec: Codec, channels: int) -> int:
    """Bytes of some channels of one view, special tokens excluded."""
    return type(codec)(codec.layout.narrowed(channels)).row_bytes if channels else 0
