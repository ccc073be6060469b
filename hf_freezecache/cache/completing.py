"""Completing a store: the files beside its shards, and its final name."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import safetensors.torch
import torch

from .codec import Codec
from .directories import discard_aside, rename_aside, sync_directory
from .manifest import Manifest, StoreError
from .names import CODEC_FILE, DATASET_INFO_FILE, DATASET_STATE_FILE, MANIFEST, note_file
from .shards import shard_features
from .store import FeatureStore
from .view_columns import ViewColumns


def small_files(
    codec: Codec, views: ViewColumns, manifest: Manifest, notes: Mapping[str, Mapping[str, torch.Tensor]]
) -> dict[str, bytes]:
    """The contents of all files of a store but its shards.

    Args:
        codec: the fitted codec.
        views: columns of the augmented views.
        manifest: the manifest without its `files`, which are filled in here.
        notes: tensors for people and tools, by file name without `.safetensors`.

    Returns:
        File name -> content; the manifest is the last.
    """
    state: dict[str, Any] = {
        "_data_files": [{"filename": shard.name} for shard in manifest.shards],
        "_fingerprint": manifest.fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    with tempfile.TemporaryDirectory() as directory:
        info = datasets.DatasetInfo(features=shard_features(codec, views, manifest.inputs, manifest.lossless))
        info.write_to_directory(directory)
        contents = {DATASET_INFO_FILE: (Path(directory) / DATASET_INFO_FILE).read_bytes()}
    contents[DATASET_STATE_FILE] = json.dumps(state, indent=2, sort_keys=True).encode()
    contents[CODEC_FILE] = _to_safetensors({**codec.tensors(), **views.spec.tensors()})
    for name, tensors in notes.items():
        contents[note_file(name)] = _to_safetensors(tensors)
    files = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }
    contents[MANIFEST] = Manifest(**{**manifest.__dict__, "files": files}).to_json().encode()
    return contents


def complete(aside: Path, final: Path, files: Mapping[str, bytes]) -> None:
    """Writes the small files of a store, makes them durable and renames the directory to its final name.

    Args:
        aside: directory with the shards.
        final: path of the complete store. If another process has built the store meanwhile, that one is used and the
            directory `aside` is deleted.
        files: what `small_files` returned.

    Raises:
        OSError: if a file cannot be written, or the directory cannot be renamed and `final` is no complete store.
    """
    for name, content in files.items():
        _write(aside / name, content)
    sync_directory(aside)
    try:
        rename_aside(aside, final)
    except OSError as error:
        try:
            FeatureStore.open(final).verify()
        except (StoreError, OSError) as problem:
            raise OSError(f"the finished store cannot get its name {final}: {error}; {problem}") from error
        discard_aside(aside)
    sync_directory(final.parent)


def _to_safetensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    return safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()})


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
