"""A store without files: rows that were encoded to measure what they cost, to be read as those of a store are."""

from __future__ import annotations

import pyarrow as pa

from ..build.store_spec import StoreSpec
from ..cache.codec import Codec
from ..cache.held_files import MemoryFile
from ..cache.manifest import FORMAT_VERSION, Manifest
from ..cache.names import shard_name
from ..cache.rows import BatchSplit
from ..cache.store import FeatureStore
from ..cache.view_columns import ViewColumns


def store_in_memory(
    spec: StoreSpec, codec: Codec, views: ViewColumns, split: BatchSplit, rows: int, buffer: pa.Buffer
) -> FeatureStore:
    """What was written as a store without files.

    Args:
        spec: of the store.
        codec: fitted.
        views: columns of the augmented views.
        split: a batch's model inputs.
        rows: samples that were written.
        buffer: the bytes of the only shard.
    """
    view_spec = views.spec
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        fingerprint="",
        made_from={},
        cut=spec.cut,
        codec=spec.codec,
        layout=spec.layout.to_json(),
        rows=rows,
        views=view_spec.count,
        geometry=view_spec.geometry,
        sensitive_channels=None if view_spec.channels is None else view_spec.channels.tolist(),
        own_inputs=view_spec.own_inputs,
        inputs=split.describe(),
        constants=split.constants,
        shards=[],
        files={},
        lossless=spec.lossless,
    )
    return FeatureStore(spec.path, manifest, codec, views, {shard_name(0, 1): MemoryFile(memoryview(buffer))})
