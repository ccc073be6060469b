"""Building a store: the frozen prefix runs once over the data set, every process over its own range."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
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
    """
    found, problem = False, None
    if group.rank == 0 and plan.path.exists():
        try:
            store = FeatureStore.open(plan.path)
            if not store.manifest.fingerprint == digest(store.manifest.made_from) == plan.path.name:
                raise StoreError(f"{plan.path} holds another store: its manifest does not match its name.")
            found = store.verify()
        except (StoreError, OSError) as error:
            problem = str(error)
            shutil.rmtree(plan.path, ignore_errors=True)
    found, problem = group.from_main((found, problem))
    if problem is not None:
        logger.warning(f"A feature store could not be reused and is built again: {problem}")
    return FeatureStore.open(plan.path) if found else None


def materialize(plan: BuildPlan, group: Group) -> FeatureStore:
    """Runs the prefix over all samples and writes the store.

    Every process writes the shard of a contiguous range of samples; the main process fits the codec before and
    completes the store after. The bytes do not depend on the number of processes. The random generators are left
    untouched.

    Raises:
        BuildFailed: if some process could not write; nothing is left behind.
        ValueError: if a feature is not finite (the sample is named) or a batch cannot be kept per row.
    """
    build = _Build(plan, group)
    with preserve_rng():
        return build.run()


class _Build:
    def __init__(self, plan: BuildPlan, group: Group):
        self.plan, self.group = plan, group
        self.kept: dict[int, tuple[BatchSplit, torch.Tensor]] = {}

    def run(self) -> FeatureStore:
        plan, group = self.plan, self.group
        codec = make_codec(plan.codec, plan.layout)
        probe = split_batch(plan.source.probe(), plan.chain.main_input)
        tensors = self._together(lambda: self._fit(codec) if group.rank == 0 else None)[0]
        codec.load_tensors(tensors)
        aside = Path(self._together(lambda: str(create_aside(plan.path)) if group.rank == 0 else None)[0])
        try:
            shards = self._together(lambda: self._write_shard(aside, codec, probe))
            self._together(lambda: self._complete(aside, codec, probe, shards) if group.rank == 0 else None)
        except BaseException:
            if group.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise
        return FeatureStore.open(plan.path)

    def _together(self, step: Callable[[], Any]) -> list[Any]:
        """Runs a step on every process; if it fails on one, all raise the same."""
        result, failure = None, None
        try:
            result = step()
        except (OSError, ValueError, StoreError) as error:
            failure = error
        outcomes = self.group.gather(
            (result, None if failure is None else (isinstance(failure, OSError), str(failure)))
        )
        for _, failed in outcomes:
            if failed is not None:
                is_os_error, message = failed
                raise BuildFailed(message) if is_os_error else ValueError(message) from failure
        return [value for value, _ in outcomes]

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
        return codec.fit(torch.cat([features for _, features in self.kept.values()])).tensors()

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
