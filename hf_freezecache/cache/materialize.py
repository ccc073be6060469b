"""Building a store: the frozen prefix runs once over the data set, every process over its own range."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from .rows import BatchSplit, RowSource, split_batch
from .store import (
    FORMAT_VERSION,
    FeatureStore,
    Manifest,
    Shard,
    ShardWriter,
    StoreError,
    complete,
    create_aside,
    shard_name,
)

logger = logging.get_logger(__name__)

#: Ranges whose features the codec is fitted on, spread over the data set, and the most memory they may take.
_FIT_BATCHES, _FIT_BYTES = 8, 2**28
#: Values of a channel, and samples, that are enough to know its distribution.
_FIT_VALUES_PER_CHANNEL, _FIT_ROWS = 2**14, 32


class BuildFailed(OSError):
    """A store could not be written (full disk, missing permission). Training can go on without it."""


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

    @property
    def path(self) -> Path:
        """Where the finished store lies."""
        return self.directory / digest(self.made_from)


def estimate_bytes(plan: BuildPlan) -> int:
    """Bytes of the Arrow files that the plan would write, from the codec's row size and one probe row's inputs."""
    split = split_batch(plan.source.probe(), plan.chain.main_input)
    per_row = make_codec(plan.codec, plan.layout).row_bytes + 8
    for value in split.columns.values():
        row = value[0]
        per_row += row.numel() * row.element_size() if isinstance(row, torch.Tensor) else len(str(row)) + 8
    return per_row * len(plan.source)


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


class _Build:
    def __init__(self, plan: BuildPlan, group: Group):
        self.plan, self.group = plan, group
        self.kept: dict[int, tuple[BatchSplit, torch.Tensor]] = {}

    def run(self) -> FeatureStore:
        plan, group = self.plan, self.group
        codec = make_codec(plan.codec, plan.layout)
        probe = split_batch(plan.source.probe(), plan.chain.main_input)
        codec.load_tensors(group.on_main(lambda: self._fit(codec)))
        mine = group.share(plan.source.num_batches)
        self.kept = {number: batch for number, batch in self.kept.items() if number in mine}
        aside = group.on_main(lambda: create_aside(plan.path))
        try:
            shards = group.together(lambda: self._write_shard(aside, codec, probe))
            group.on_main(lambda: self._complete(aside, codec, probe, shards))
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
        batch_bytes = source.batch_size * self.plan.layout.values * 4
        count = max(1, min(_FIT_BATCHES, source.num_batches, _FIT_BYTES // batch_bytes))
        chosen = sorted({round(number * (source.num_batches - 1) / max(count - 1, 1)) for number in range(count)})
        for number, split, features in self._features(chosen):
            self.kept[number] = (split, features)
        return codec.fit(fit_sample([features for _, features in self.kept.values()], self.plan.layout)).tensors()

    def _features(self, numbers: list[int]) -> Iterator[tuple[int, BatchSplit, torch.Tensor]]:
        plan = self.plan
        for number, batch in plan.source.loader(numbers):
            split = split_batch(batch, plan.chain.main_input)
            features = plan.chain.prefix(plan.model_inputs(batch), plan.cut)
            if tuple(features.shape[1:]) != plan.layout.shape:
                first = plan.source.rows(number)[0]
                raise ValueError(
                    f"the feature of sample {first} and those after it has shape {tuple(features.shape[1:])} instead "
                    f"of {plan.layout.shape}: a store needs inputs of one size. Resize them, or use cache='never'."
                )
            yield number, split, features

    def _write_shard(self, aside: Path, codec: Codec, probe: BatchSplit) -> Shard:
        plan, group = self.plan, self.group
        mine = group.share(plan.source.num_batches)
        fresh = self._features([number for number in mine if number not in self.kept])
        bar = tqdm(total=len(mine), desc="Building feature store", disable=plan.disable_tqdm or group.rank != 0)
        with bar, ShardWriter(aside / shard_name(group.rank, group.size), codec, probe.describe()) as writer:
            for number in mine:
                split, features = self.kept.pop(number) if number in self.kept else next(fresh)[1:]
                rows = plan.source.rows(number)
                if split.constants != probe.constants:
                    raise ValueError(
                        f"the collator's constants differ between batches: {split.constants} at sample {rows[0]}, "
                        f"{probe.constants} before; only what is the same for all can be replayed."
                    )
                if split.columns.keys() != probe.columns.keys():
                    raise ValueError(
                        f"the collator returns {sorted(split.columns)} at sample {rows[0]}, "
                        f"but {sorted(probe.columns)} before; a store needs the same entries for all samples."
                    )
                writer.write(rows[0], codec.encode(features, sample_ids=rows), split.columns)
                bar.update()
        return writer.shard()

    def _complete(self, aside: Path, codec: Codec, probe: BatchSplit, shards: list[Shard]) -> None:
        plan = self.plan
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            fingerprint=plan.path.name,
            made_from=dict(plan.made_from),
            cut=plan.cut,
            codec=plan.codec,
            layout=plan.layout.to_json(),
            rows=len(plan.source),
            views=0,
            inputs=probe.describe(),
            constants=probe.constants,
            shards=shards,
            files={},
        )
        complete(aside, plan.path, codec, manifest)
