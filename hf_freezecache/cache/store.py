"""A store of features on disk: reading its rows, writing its files besides the shards, completing and deleting it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import pyarrow as pa
import safetensors.torch
import torch

from ..model.layout import FeatureLayout
from .codec import Codec, make_codec
from .lossless import packed_columns
from .manifest import Manifest, StoreError
from .mapped import MappedColumn, PackedColumn
from .names import (
    CODEC_FILE,
    DATASET_INFO_FILE,
    DATASET_STATE_FILE,
    MANIFEST,
    aside_path,
    note_file,
    own_input,
    parse_aside,
    parse_removed,
    removed_path,
    view_tensor,
)
from .rows import InputColumn
from .shards import file_sha256, input_columns, shard_features
from .view_columns import VIEW_TENSORS, ViewColumns, ViewSpec


class FeatureStore:
    """A complete store, opened for reading. Its files are mapped into memory, not loaded.

    Args:
        path: its directory.
        manifest: its contents.
        codec: the fitted codec.
        views: columns of the augmented views.
        dataset: the rows, where they are in memory already; None: those of the files.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        codec: Codec,
        views: ViewColumns,
        dataset: datasets.Dataset | None = None,
    ):
        self.path, self.manifest, self.codec, self.views = path, manifest, codec, views
        self._dataset = dataset

    @classmethod
    def open(cls, path: str | os.PathLike, manifest_name: str = MANIFEST) -> FeatureStore:
        """Opens a store. Checks the manifest, the checksums of the small files and the sizes of the shards.

        Args:
            path: directory of the store.
            manifest_name: file name of the manifest; a directory that is not complete has another one.

        Raises:
            StoreError: if a file is missing or edited, or the store is of another version. Damage inside a shard is
                found by `verify`.
        """
        path = Path(path)
        if not (path / manifest_name).is_file():
            raise StoreError(f"{path} is not a feature store: it has no {manifest_name}.")
        manifest = Manifest.from_json((path / manifest_name).read_bytes(), path / manifest_name)
        for name, size in _sizes(manifest).items():
            on_disk = (path / name).stat().st_size if (path / name).is_file() else None
            if on_disk != size:
                state = "is missing" if on_disk is None else f"has {on_disk} bytes instead of {size}"
                raise StoreError(f"{path / name} {state}: delete the store, it is built again.")
        for name, entry in manifest.files.items():
            _check_sha256(path / name, entry["sha256"])
        tensors = safetensors.torch.load_file(path / CODEC_FILE)
        view_tensors = {name: tensors.pop(view_tensor(name), None) for name in VIEW_TENSORS}
        spec = ViewSpec(manifest.views, manifest.geometry, own_inputs=manifest.own_inputs, **view_tensors)
        codec = make_codec(manifest.codec, FeatureLayout.from_json(manifest.layout)).load_tensors(tensors)
        return cls(path, manifest, codec, ViewColumns(spec, codec))

    def __reduce__(self):
        # Mapped memory cannot be pickled: the other process opens the files itself.
        return FeatureStore.open, (self.path,)

    def __len__(self) -> int:
        return self.manifest.rows

    @property
    def bytes(self) -> int:
        """Size of the Arrow files, in bytes."""
        return sum(shard.bytes for shard in self.manifest.shards)

    @property
    def total_bytes(self) -> int:
        """Size of all files, in bytes."""
        return sum(_sizes(self.manifest).values()) + (self.path / MANIFEST).stat().st_size

    @property
    def dataset(self) -> datasets.Dataset:
        """The store as a `datasets.Dataset`, memory-mapped."""
        if self._dataset is None:
            self._dataset = datasets.load_from_disk(str(self.path), keep_in_memory=False)
        return self._dataset

    def verify(self) -> bool:
        """Reads every file and compares its sha256 with that of the manifest.

        Returns:
            True.

        Raises:
            StoreError: if a file does not match; the message names it.
        """
        for name, entry in self.manifest.files.items():
            _check_sha256(self.path / name, entry["sha256"])
        for shard in self.manifest.shards:
            _check_sha256(self.path / shard.name, shard.sha256)
        return True

    def read(self, indices: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
        """Reads and decodes the base view of some samples.

        Args:
            indices: row numbers `(B,)`.
            device: where the features are decoded.

        Returns:
            Features `(B, *layout.shape)`.

        Raises:
            IndexError: if a row does not exist.
            StoreError: if a packed row is damaged.

        Shapes: B samples.
        """
        rows = self.read_rows(indices)
        return self.codec.decode({name: rows[name].to(device) for name in self.codec.columns})

    def read_rows(self, indices: Sequence[int], views: np.ndarray | None = None) -> dict[str, Any]:
        """Reads codes and model inputs of some samples, without decoding them.

        Args:
            indices: row numbers `(B,)`.
            views: int64 `(B,)`, view of each sample; None: the base view.

        Returns:
            Entries of a batch by name: first the codes, i.e. the codec's columns and, for stores that hold only the
            sensitive channels of views, the entries of `ViewColumns.pick`; then the model inputs.

        Raises:
            IndexError: if a row does not exist.
            StoreError: if a packed row is damaged.

        Shapes: B samples.
        """
        rows = np.asarray(indices, dtype=np.int64)
        codes = {name: self._columns[name].take(rows) for name in self.codec.columns}
        if views is not None and self.manifest.views:
            codes = self.views.pick(codes, views, lambda name, positions: self._columns[name].take(rows[positions]))
        batch = {name: torch.from_numpy(value) for name, value in codes.items()}
        for name, column in self.manifest.inputs.items():
            batch[name] = self._read_input(name, column, rows, views)
        batch.update(self.manifest.constants)
        return batch

    def read_codes(self, names: Sequence[str], indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Reads columns of codes or geometry as they are stored.

        Args:
            names: of the columns.
            indices: row numbers `(B,)`.

        Returns:
            Name -> `(B, length)`.

        Raises:
            IndexError: if a row does not exist.
            StoreError: if a packed row is damaged.

        Shapes: B samples.
        """
        rows = np.asarray(indices, dtype=np.int64)
        return {name: torch.from_numpy(self._columns[name].take(rows)) for name in names}

    def read_input(self, name: str, column: InputColumn, indices: Sequence[int] | np.ndarray) -> Any:
        """Reads a column of model inputs: a tensor `(B, *column.shape)`, or a list.

        Args:
            name: of the column; of one that a view has for itself, as `own_input` writes it.
            column: what it holds.
            indices: row numbers `(B,)`.

        Raises:
            IndexError: if a row does not exist.

        Shapes: B samples.
        """
        rows = np.asarray(indices, dtype=np.int64)
        if column.is_list:
            return self.dataset.data.column(name).take(pa.array(rows)).to_pylist()
        return column.to_tensor(self._columns[name].take(rows))

    def read_note(self, name: str) -> dict[str, torch.Tensor] | None:
        """Tensors for people and tools; None if the store has no such note.

        Args:
            name: of the note, e.g. `sensitivity`.
        """
        if note_file(name) not in self.manifest.files:
            return None
        return safetensors.torch.load_file(self.path / note_file(name))

    def frame_bytes(self) -> dict[str, float]:
        """Mean size of a packed row in bytes, by column; empty if rows are not packed."""
        return {name: column.frame_bytes for name, column in self._columns.items() if isinstance(column, PackedColumn)}

    def code_names(self, batch: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the codes among the entries that `read_rows` returned."""
        return tuple(
            name for name in batch if name not in self.manifest.inputs and name not in self.manifest.constants
        )

    def _read_input(self, name: str, column: InputColumn, rows: np.ndarray, views: np.ndarray | None) -> Any:
        values = self.read_input(name, column, rows)
        if views is None or not self.manifest.own_inputs:
            return values
        for view in np.unique(views[views > 0]):
            positions = np.flatnonzero(views == view)
            own = self.read_input(own_input(view, name), column, rows[positions])
            for position, value in zip(positions, own, strict=True):
                values[position] = value
        return values

    @cached_property
    def _columns(self) -> dict[str, MappedColumn | PackedColumn]:
        inputs = input_columns(self.manifest.inputs, self.views.spec)
        packed = packed_columns({**self.codec.columns, **self.views.columns}, self.manifest.lossless)
        names = [
            *self.codec.columns,
            *self.views.columns,
            *(name for name, column in inputs.items() if not column.is_list),
        ]
        columns = {name: self.dataset.data.column(name) for name in names}
        return {
            name: PackedColumn(column, packed[name], f"column {name!r} of {self.path}")
            if name in packed
            else MappedColumn(column)
            for name, column in columns.items()
        }


def create_aside(final: Path) -> Path:
    """Makes a directory in which a store is written before it gets its final name.

    Deletes the directories that killed processes of this machine have left behind for the same store, and stores that
    were being deleted.

    Args:
        final: path of the complete store.

    Returns:
        Path of the new directory, beside the final one.

    Raises:
        OSError: if it cannot be made.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    host = socket.gethostname()
    for path in final.parent.iterdir():
        aside = parse_aside(path.name)
        if aside is None or (aside.final, aside.host) != (final.name, host):
            continue
        if not psutil.pid_exists(aside.process):
            shutil.rmtree(path, ignore_errors=True)
    _remove_removed(final.parent)
    path = aside_path(final, host, os.getpid())
    path.mkdir()
    return path


def remove_store(path: Path) -> None:
    """Deletes a store. Does nothing if it no longer exists.

    The store is renamed first: if the process is killed at any moment, no part of a store keeps the name of a complete
    one. Files that are left then, or cannot be deleted yet, are deleted with the next store that is deleted or built.
    Processes that have mapped the files can still read them (POSIX).

    Raises:
        OSError: if the store cannot be renamed; it is unchanged then.
    """
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, removed_path(path))
        _sync_directory(path.parent)
    _remove_removed(path.parent)


def _remove_removed(directory: Path) -> None:
    # No process opens a renamed store: unlike a build's directory, any process may delete it.
    for path in directory.iterdir():
        if parse_removed(path.name) is not None:
            shutil.rmtree(path, ignore_errors=True)


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
    _sync_directory(aside)
    try:
        os.rename(aside, final)
    except OSError as error:
        try:
            FeatureStore.open(final).verify()
        except (StoreError, OSError) as problem:
            raise OSError(f"the finished store cannot get its name {final}: {error}; {problem}") from error
        shutil.rmtree(aside, ignore_errors=True)
    _sync_directory(final.parent)


def _check_sha256(path: Path, expected: str) -> None:
    if file_sha256(path) != expected:
        raise StoreError(f"{path} is damaged (sha256 differs): delete the store, it is built again.")


def _sizes(manifest: Manifest) -> dict[str, int]:
    sizes = {shard.name: shard.bytes for shard in manifest.shards}
    return sizes | {name: entry["bytes"] for name, entry in manifest.files.items()}


def _to_safetensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    return safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()})


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(directory: Path) -> None:
    """Checks that stores can be written in a directory; makes it if it does not exist.

    Raises:
        OSError: if they cannot; the message names the remedies.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise OSError(
            f"the feature cache directory {directory} is not writable ({error}): set feature_cache_dir to one that is "
            "or use cache='never'."
        ) from error
