"""What a store will be, settled before a byte is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..cache.fingerprint import digest
from ..cache.rows import BatchSplit, RowSource
from ..cache.view_columns import ViewSpec
from ..model.chain import BlockChain
from ..model.layout import FeatureLayout
from .feature_sources import FeatureSource, split_samples


@dataclass(frozen=True)
class StoreSpec:
    """What to build.

    Args:
        chain: the model, traced and proved at `cut`.
        cut: frozen blocks.
        source: the samples.
        codec: name of the codec.
        layout: the feature as the prefix returns it in this training (mixed precision included).
        made_from: the fingerprint's inputs, the main process's on every process.
        directory: the directory of the stores.
        feature_source: computes the features.
        disable_tqdm: no progress bar.
        views: which augmented views to store, and what of them.
        notes: tensors for people and tools, in files beside the shards, by file name without `.safetensors`.
        weights: float32 `(C,)`, the loss's sensitivity to an error in each channel, for codecs that use it.
        limit: most bytes that the store's files may take, all together; None: whatever the disk holds.
        lossless: whether every row's codes are packed with zstd; `made_from` tells it too.
        tokens: mean number of tokens of a sample, of texts that are stored without padding; 1 for all others.
        owner: the training that may delete the store, see `Holdings`; None: nobody may.

    Shapes: C channels.
    """

    chain: BlockChain
    cut: int
    source: RowSource
    codec: str
    layout: FeatureLayout
    made_from: Mapping[str, Any]
    directory: Path
    feature_source: FeatureSource
    disable_tqdm: bool = False
    views: ViewSpec = field(default_factory=ViewSpec)
    notes: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    weights: torch.Tensor | None = None
    limit: int | None = None
    lossless: bool = False
    owner: str | None = None
    tokens: float = 1.0

    def split(self, batch: Mapping[str, Any]) -> BatchSplit:
        """A collated batch as this store holds it; see `split_batch` and `split_texts`."""
        return split_samples(batch, self.chain, self.cut, self.source, self.layout)

    @property
    def path(self) -> Path:
        """The directory of the finished store."""
        return self.directory / digest(self.made_from)
