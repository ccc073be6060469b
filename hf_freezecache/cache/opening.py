"""Opening the files of a store: each is checked before it is used, whoever has written it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch

from ..model.layout import FeatureLayout
from .arrow_stream import PlacedBatch, read_stream
from .codec import Codec, make_codec
from .held_files import FileState, HeldFile, Readable, read_all
from .lossless import packed_columns
from .manifest import REBUILD, Manifest, StoreError, translated
from .names import CODEC_FILE, MANIFEST, TOKENS, view_tensor
from .shards import input_columns, shard_features
from .small_files import LARGEST_JSON
from .stored_columns import BitColumn, FixedColumn, PackedColumn, StoredColumn, TextColumn, TokenColumn
from .view_columns import VIEW_TENSORS, ViewColumns, ViewSpec


class OpenedStore(NamedTuple):
    """What a store consists of, all of it checked but the content of the shards."""

    manifest: Manifest
    codec: Codec
    views: ViewColumns
    files: dict[str, HeldFile]


def open_files(
    path: Path,
    open_one: Callable[[str], int],
    manifest_name: str = MANIFEST,
    states: Mapping[str, FileState] | None = None,
) -> OpenedStore:
    """Opens the files that a store is read from.

    Args:
        path: directory of the store.
        open_one: returns a descriptor for a file name.
        manifest_name: of the manifest; a store that was only begun has another one, and no shards.
        states: in which the files were verified, by name; None: they count as verified as they are.

    Raises:
        StoreError: if they are not the files of a store.
        OSError: if they cannot be read.
    """
    states = states or {}
    descriptor = open_one(manifest_name)
    files: dict[str, HeldFile] = {}
    try:
        size = os.fstat(descriptor).st_size
        if size > LARGEST_JSON:
            raise StoreError(f"{path / manifest_name} has {size:,} bytes, which no manifest has: {REBUILD}.")
        text = read_all(descriptor, size)
    except (OSError, StoreError):
        os.close(descriptor)
        raise
    files[MANIFEST] = HeldFile(path / manifest_name, descriptor, len(text), hashlib.sha256(text).hexdigest())
    manifest = Manifest.from_json(text, path / manifest_name)
    with translated(f"{path / manifest_name} is not that of a store"):
        manifest.check(begun=manifest_name != MANIFEST)
    entries = {shard.name: (shard.bytes, shard.sha256) for shard in manifest.shards}
    entries[CODEC_FILE] = manifest.files[CODEC_FILE]["bytes"], manifest.files[CODEC_FILE]["sha256"]
    for name, (size, sha256) in entries.items():
        files[name] = HeldFile(path / name, open_one(name), size, sha256, states.get(name))
    files[CODEC_FILE].verify()
    with translated(f"{path / CODEC_FILE} does not fit the manifest"):
        tensors = safetensors.torch.load(files[CODEC_FILE].read(files[CODEC_FILE].size, 0))
        spec = _read_view_spec(manifest, tensors)
        codec = make_codec(manifest.codec, FeatureLayout.from_json(manifest.layout)).load_tensors(tensors)
        return OpenedStore(manifest, codec, ViewColumns(spec, codec), files)


def _read_view_spec(manifest: Manifest, tensors: dict[str, torch.Tensor]) -> ViewSpec:
    """Takes the tensors of the views out of those of the codec's file."""
    fields = {name: tensors.pop(view_tensor(name), None) for name in VIEW_TENSORS}
    spec = ViewSpec(manifest.views, manifest.geometry, own_inputs=manifest.own_inputs, **fields)
    layout = FeatureLayout.from_json(manifest.layout)
    if spec.whole:
        fits = all(value is None for value in fields.values())
    else:
        channels = spec.warped.channels
        rows = [
            count * layout.channels + len(channels) + 1 for count in (1, 9)
        ]  # a position alone, or with its neighbours
        maps, limits = spec.channel_maps, spec.limits
        fits = (
            (channels.dtype, channels.tolist()) == (torch.int64, manifest.sensitive_channels)
            and _is_float(spec.outside, (layout.channels,))
            and (maps is None) == (limits is None)
            and (maps is None or any(_is_float(maps, (2, inputs, layout.channels)) for inputs in rows))
            and (limits is None or _is_float(limits, (2, layout.channels)))
        )
    if not fits:
        raise StoreError(f"the tensors of the views do not fit the manifest: {REBUILD}.")
    return spec


def _is_float(value: torch.Tensor | None, shape: tuple[int, ...]) -> bool:
    return value is not None and (value.dtype, tuple(value.shape)) == (torch.float32, shape)


def open_columns(
    shards: Sequence[Readable], manifest: Manifest, codec: Codec, views: ViewColumns, path: Path
) -> dict[str, StoredColumn]:
    """The columns that are read, by name.

    Args:
        shards: the Arrow files, in the order of their rows.
        manifest: of the store.
        codec: of the base view.
        views: columns of the augmented views.
        path: of the store, for error messages.

    Raises:
        StoreError: if the files hold other columns or numbers of rows than the manifest says.
    """
    expected = shard_features(codec, views, manifest.inputs, manifest.lossless).arrow_schema
    batches: list[PlacedBatch] = []
    with translated(f"{path} does not hold what its manifest says"):
        schema = expected
        for number, shard in enumerate(shards):
            found, own = read_stream(shard)
            if not _same_columns(found, expected) or (number and found != schema):
                raise StoreError(f"{shard.name} has other columns than the manifest says: {REBUILD}.")
            rows = sum(batch.layout.rows for batch in own)
            if manifest.shards and rows != manifest.shards[number].rows:
                raise StoreError(f"{shard.name} has {rows} rows, but the manifest says otherwise: {REBUILD}.")
            schema = found
            batches += own
        packed = packed_columns({**codec.columns, **views.columns}, manifest.lossless)
        names = [*codec.columns, *views.columns, *input_columns(manifest.inputs, views.spec)]
        columns: dict[str, StoredColumn] = {}
        for name in reversed(names):  # the numbers of tokens before the tokens
            if codec.layout.is_token and name in codec.columns:
                dtype, length = codec.columns[name]
                kind, lengths = (np.dtype(str(dtype).removeprefix("torch.")), length), columns[TOKENS]
                assert isinstance(lengths, FixedColumn)  # by the schema
                columns[name] = TokenColumn(batches, schema, name, path, kind, lengths, name in packed)
            else:
                columns[name] = _make_column(batches, schema, name, path, packed.get(name))
        if any(len(column) != manifest.rows for column in columns.values()):
            raise StoreError(f"{path} does not have {manifest.rows} rows: {REBUILD}.")
        return columns


def _make_column(
    batches: Sequence[PlacedBatch], schema: pa.Schema, name: str, path: Path, width: int | None
) -> StoredColumn:
    kind = schema.field(name).type
    if width is not None:
        return PackedColumn(batches, schema, name, path, width)
    if pa.types.is_boolean(kind):
        return BitColumn(batches, schema, name, path)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return TextColumn(batches, schema, name, path)
    return FixedColumn(batches, schema, name, path)


def _same_columns(found: pa.Schema, expected: pa.Schema) -> bool:
    """Whether a file has the columns of a store; earlier releases wrote strings with small offsets."""
    return found.names == expected.names and all(
        _kind(one.type) == _kind(other.type) for one, other in zip(found, expected, strict=True)
    )


def _kind(kind: pa.DataType) -> object:
    if pa.types.is_fixed_size_list(kind):
        return kind.list_size, kind.value_type
    return pa.large_string() if pa.types.is_string(kind) else kind


def check_state(file: HeldFile, manifest: Manifest) -> None:
    """Checks that what `datasets` reads are the store's own files.

    Args:
        file: `state.json`.
        manifest: of the store.

    Raises:
        StoreError: if it names others.
    """
    with translated(f"{file.path} is not that of a store"):
        named = [entry["filename"] for entry in json.loads(file.read(file.size, 0))["_data_files"]]
    if named != [shard.name for shard in manifest.shards]:
        raise StoreError(f"{file.path} names other files than the manifest: {REBUILD}.")
