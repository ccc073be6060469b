"""Stores of rows that no model made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from hf_freezecache import FeatureStore
from hf_freezecache.cache.codec import Codec
from hf_freezecache.cache.completing import complete, small_files
from hf_freezecache.cache.directories import create_aside
from hf_freezecache.cache.fingerprint import digest
from hf_freezecache.cache.manifest import FORMAT_VERSION, Manifest
from hf_freezecache.cache.names import shard_name
from hf_freezecache.cache.rows import InputColumn
from hf_freezecache.cache.shards import ShardWriter
from hf_freezecache.cache.view_columns import ViewColumns, ViewSpec

LABELS = {"labels": InputColumn("int64")}


def write_store(
    path: Path,
    codec: Codec,
    batches: Iterable[tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]],
    inputs: Mapping[str, InputColumn],
) -> FeatureStore:
    """Writes a store as a build does: shard, checksums, codec, manifest, all made durable, then the rename.

    Args:
        path: of the store.
        codec: fitted.
        batches: `(codes, model inputs)`, in the order of the rows.
        inputs: the columns of the model inputs.
    """
    aside = create_aside(path)
    views = ViewColumns(ViewSpec(), codec)
    rows = 0
    with ShardWriter(aside / shard_name(0, 1), codec, views, inputs) as writer:
        for codes, values in batches:
            writer.write(rows, codes, values)
            rows += len(codes["base"])
    content: dict[str, Any] = dict(cut=1, codec=codec.name, layout=codec.layout.to_json(), rows=rows)
    content |= dict(views=0, geometry=None, sensitive_channels=None, own_inputs=False)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        fingerprint=digest({}),
        made_from={},
        inputs=dict(inputs),
        constants={},
        shards=[writer.shard()],
        files={},
        **content,
    )
    complete(aside, path, small_files(codec, views, manifest, {}))
    return FeatureStore.open(path)


def arrow_bytes(
    path: Path, codec: Codec, batches: Iterable[Mapping[str, torch.Tensor]], lossless: bool = False
) -> int:
    """Writes an Arrow file of codes and row numbers, as a store has it, and returns its size."""
    first = 0
    with ShardWriter(path, codec, ViewColumns(ViewSpec(), codec), {}, lossless) as writer:
        for codes in batches:
            writer.write(first, codes, {})
            first += len(codes["base"])
    return path.stat().st_size
