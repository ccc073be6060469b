"""The features on disk: Arrow shards that `datasets` opens, a manifest that vouches for them, and reading rows."""

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
from .lossless import pack_rows, packed_columns
from .manifest import Manifest, Shard, StoreError
from .mapped import MappedColumn, PackedColumn
from .names import (
    CODEC_FILE,
    DATASET_INFO_FILE,
    DATASET_STATE_FILE,
    MANIFEST,
    SAMPLE_ID,
    aside_path,
    note_file,
    own_input,
    parse_aside,
    parse_removed,
    removed_path,
    view_tensor,
)
from .rows import InputColumn, RowError
from .view_columns import VIEW_TENSORS, ViewColumns, ViewSpec


class FeatureStore:
    """A complete store, opened for reading. Rows are mapped from the files, not loaded."""

    def __init__(self, path: Path, manifest: Manifest, codec: Codec, views: ViewColumns):
        self.path, self.manifest, self.codec, self.views = path, manifest, codec, views

    @classmethod
    def open(cls, path: str | os.PathLike, manifest_name: str = MANIFEST) -> FeatureStore:
        """Opens a store; checks the manifest and the small files, and that the shards have their sizes.

        Args:
            path: of the store.
            manifest_name: another one in a directory that is not complete.

        Raises:
            StoreError: if something is missing, of another version or edited; see `verify` for damage inside a file.
        """
        path = Path(path)
        if not (path / manifest_name).is_file():
            raise StoreError(f"{path} is not a feature store: it has no {manifest_name}.")
        manifest = Manifest.from_json((path / manifest_name).read_bytes(), path / manifest_name)
        for name, size in _sizes(manifest).items():
            found = (path / name).stat().st_size if (path / name).is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes instead of {size}"
                raise StoreError(f"{path / name} {state}: delete the store, it is built again.")
        for name, entry in manifest.files.items():
            _check_sha256(path / name, entry["sha256"])
        tensors = safetensors.torch.load_file(path / CODEC_FILE)
        of_views = {name: tensors.pop(view_tensor(name), None) for name in VIEW_TENSORS}
        spec = ViewSpec(manifest.views, manifest.geometry, own_inputs=manifest.own_inputs, **of_views)
        codec = make_codec(manifest.codec, FeatureLayout.from_json(manifest.layout)).load_tensors(tensors)
        return cls(path, manifest, codec, ViewColumns(spec, codec))

    def __reduce__(self):
        # Mapped rows do not travel to another process; the files are opened again there.
        return FeatureStore.open, (self.path,)

    def __len__(self) -> int:
        return self.manifest.rows

    @property
    def bytes(self) -> int:
        """Size of the Arrow files."""
        return sum(shard.bytes for shard in self.manifest.shards)

    @property
    def total_bytes(self) -> int:
        """Size of all files."""
        return sum(_sizes(self.manifest).values()) + (self.path / MANIFEST).stat().st_size

    @cached_property
    def dataset(self) -> datasets.Dataset:
        """The store as a `datasets.Dataset`, memory-mapped."""
        return datasets.load_from_disk(str(self.path), keep_in_memory=False)

    def verify(self) -> bool:
        """Reads every file and compares its sha256.

        Returns:
            True.

        Raises:
            StoreError: naming the first file that does not match.
        """
        for name, entry in self.manifest.files.items():
            _check_sha256(self.path / name, entry["sha256"])
        for shard in self.manifest.shards:
            _check_sha256(self.path / shard.name, shard.sha256)
        return True

    def read(self, indices: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
        """Features of the given samples' base view, decoded.

        Returns:
            `(B, *layout.shape)` tensor.
        """
        rows = self.read_rows(indices)
        return self.codec.decode({name: rows[name].to(device) for name in self.codec.columns})

    def read_rows(self, indices: Sequence[int], views: np.ndarray | None = None) -> dict[str, Any]:
        """Codes and model inputs of the given samples, as stored: codes first, then the inputs by their names.

        Args:
            indices: row numbers `(B,)`.
            views: int64 `(B,)`, which view of each; None: the base view.

        Returns:
            The codec's columns; where sensitive channels are kept, what of the views is beside them (`ViewColumns`).
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

    def frame_bytes(self) -> dict[str, float]:
        """Mean size of a packed row, by column; empty where rows are not packed."""
        return {name: column.frame_bytes for name, column in self._columns.items() if isinstance(column, PackedColumn)}

    def code_names(self, batch: Mapping[str, Any]) -> tuple[str, ...]:
        """Which entries of `read_rows` are codes."""
        return tuple(
            name for name in batch if name not in self.manifest.inputs and name not in self.manifest.constants
        )

    def _read_input(self, name: str, column: InputColumn, rows: np.ndarray, views: np.ndarray | None) -> Any:
        def take(stored: str, taken: np.ndarray) -> Any:
            if column.is_list:
                return self.dataset.data.column(stored).take(pa.array(taken)).to_pylist()
            return column.to_tensor(self._columns[stored].take(taken))

        values = take(name, rows)
        if views is None or not self.manifest.own_inputs:
            return values
        for view in np.unique(views[views > 0]):
            positions = np.flatnonzero(views == view)
            own = take(own_input(view, name), rows[positions])
            for position, value in zip(positions, own, strict=True):
                values[position] = value
        return values

    @cached_property
    def _columns(self) -> dict[str, MappedColumn | PackedColumn]:
        stored = _input_columns(self.manifest.inputs, self.views.spec)
        packed = packed_columns({**self.codec.columns, **self.views.columns}, self.manifest.lossless)
        names = [
            *self.codec.columns,
            *self.views.columns,
            *(name for name, kind in stored.items() if not kind.is_list),
        ]
        columns = {name: self.dataset.data.column(name) for name in names}
        return {
            name: PackedColumn(column, packed[name], f"column {name!r} of {self.path}")
            if name in packed
            else MappedColumn(column)
            for name, column in columns.items()
        }


class ShardStream:
    """Record batches of a shard, written to any sink.

    Args:
        sink: a file or Arrow output stream.
        codec: of the base view.
        views: columns of the other views.
        inputs: model inputs that are kept per row.
        lossless: whether every row's codes are packed.
    """

    def __init__(
        self,
        sink: Any,
        codec: Codec,
        views: ViewColumns,
        inputs: Mapping[str, InputColumn],
        lossless: bool = False,
    ):
        self.inputs, self.rows = _input_columns(inputs, views.spec), 0
        self.packed = packed_columns({**codec.columns, **views.columns}, lossless)
        self._schema = _features(codec, views, inputs, lossless).arrow_schema
        self._writer = pa.ipc.new_stream(sink, self._schema)

    def write(self, first_row: int, codes: Mapping[str, torch.Tensor], inputs: Mapping[str, Any]) -> None:
        """Appends a batch whose rows follow each other from `first_row`."""
        arrays = {}
        for name, value in codes.items():
            stored = value.cpu().contiguous().numpy()
            arrays[name] = self._pack(name, stored) if name in self.packed else _fixed_size_list(stored)
            rows = len(value)
        for name, column in self.inputs.items():
            value = inputs[name]
            if column.is_list:
                arrays[name] = pa.array(value)
                continue
            stored = stored_rows(name, column, value, first_row)
            arrays[name] = pa.array(stored.reshape(-1)) if column.shape == () else _fixed_size_list(stored)
        arrays[SAMPLE_ID] = pa.array(np.arange(first_row, first_row + rows, dtype=np.int64))
        batch = pa.record_batch([arrays[name] for name in self._schema.names], schema=self._schema)
        self._writer.write_batch(batch)
        self.rows += rows

    def _pack(self, name: str, rows: np.ndarray) -> pa.Array:
        return pack_rows(rows)

    def close(self) -> None:
        self._writer.close()


class ShardWriter(ShardStream, contextlib.AbstractContextManager):
    """Writes one Arrow file of a store.

    Args:
        path: of the file.
        codec: of the base view.
        views: columns of the other views.
        inputs: model inputs that are kept per row.
        lossless: whether every row's codes are packed.
    """

    def __init__(
        self,
        path: Path,
        codec: Codec,
        views: ViewColumns,
        inputs: Mapping[str, InputColumn],
        lossless: bool = False,
    ):
        self.path = path
        self._file = open(path, "wb")
        super().__init__(self._file, codec, views, inputs, lossless)

    def close(self) -> None:
        super().close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __exit__(self, kind, error, traceback):
        if error is None:
            self.close()
        else:
            self._file.close()

    def shard(self) -> Shard:
        """The record of the finished file."""
        return Shard(self.path.name, self.rows, self.path.stat().st_size, file_sha256(self.path))


def create_aside(final: Path) -> Path:
    """Makes the directory in which a store is written before it gets its name; removes what a killed build left."""
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
    """Takes a store away; one that is not there any more is nobody's loss.

    It loses its name first, at once: killed at any moment, no half of a store stays under the name of a whole one.
    What is left then, or cannot be deleted yet, goes with the next store that is taken away or built. Processes that
    have its files mapped go on reading them (POSIX).

    Raises:
        OSError: if it cannot be renamed; it is untouched then.
    """
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, removed_path(path))
        _sync_directory(path.parent)
    _remove_removed(path.parent)


def _remove_removed(directory: Path) -> None:
    # Whoever took them away, nobody opens them again: unlike a build's directory they can be deleted by anyone.
    for path in directory.iterdir():
        if parse_removed(path.name) is not None:
            shutil.rmtree(path, ignore_errors=True)


def small_files(
    codec: Codec, views: ViewColumns, manifest: Manifest, notes: Mapping[str, Mapping[str, torch.Tensor]]
) -> dict[str, bytes]:
    """Everything of a store besides its shards: contents by file name, the manifest last.

    Args:
        codec: the fitted codec.
        views: columns of the other views.
        manifest: `files` is filled in here.
        notes: further tensors, by file name without `.safetensors`, for people and tools.
    """
    state = {
        "_data_files": [{"filename": shard.name} for shard in manifest.shards],
        "_fingerprint": manifest.fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    with tempfile.TemporaryDirectory() as directory:
        info = datasets.DatasetInfo(features=_features(codec, views, manifest.inputs, manifest.lossless))
        info.write_to_directory(directory)
        contents = {DATASET_INFO_FILE: (Path(directory) / DATASET_INFO_FILE).read_bytes()}
    contents[DATASET_STATE_FILE] = json.dumps(state, indent=2, sort_keys=True).encode()
    contents[CODEC_FILE] = _tensor_bytes({**codec.tensors(), **views.spec.tensors()})
    for name, tensors in notes.items():
        contents[note_file(name)] = _tensor_bytes(tensors)
    files = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }
    contents[MANIFEST] = Manifest(**{**manifest.__dict__, "files": files}).to_json().encode()
    return contents


def complete(aside: Path, final: Path, files: Mapping[str, bytes]) -> None:
    """Writes everything besides the shards, makes it durable and gives the store its name.

    Args:
        aside: directory with the shards.
        final: the store's name. A complete store of that name, built by somebody else meanwhile, is kept.
        files: what `small_files` returned.
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


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def _check_sha256(path: Path, expected: str) -> None:
    if file_sha256(path) != expected:
        raise StoreError(f"{path} is damaged (sha256 differs): delete the store, it is built again.")


def stored_rows(name: str, column: InputColumn, value: torch.Tensor, sample: int) -> np.ndarray:
    """A tensor entry of a collated batch as it is stored: `(B, n)`.

    Args:
        name: of the entry.
        column: what its rows are.
        value: `(B, *column.shape)`.
        sample: the first one's number, for error messages.

    Raises:
        RowError: if its rows have another shape or type than the column.
    """
    if tuple(value.shape[1:]) != column.shape or str(value.dtype) != f"torch.{column.dtype}":
        raise RowError(
            f"the collator's '{name}' has rows of {tuple(value.shape[1:])} ({value.dtype}) at sample {sample} but of "
            f"{column.shape} (torch.{column.dtype}) before: pad to a fixed size, or use cache='never'."
        )
    return column.to_numpy(value)


def _input_columns(inputs: Mapping[str, InputColumn], spec: ViewSpec) -> dict[str, InputColumn]:
    """Model inputs as columns: of the base view, or of all views, and of each other view that has its own."""
    views = range(1, spec.count + 1) if spec.own_inputs else ()
    return {**inputs, **{own_input(view, name): column for view in views for name, column in inputs.items()}}


def _features(
    codec: Codec, views: ViewColumns, inputs: Mapping[str, InputColumn], lossless: bool
) -> datasets.Features:
    features = {SAMPLE_ID: datasets.Value("int64")}
    codes = {**codec.columns, **views.columns}
    packed = packed_columns(codes, lossless)
    for name, (dtype, length) in codes.items():
        if name in packed:
            features[name] = datasets.Value("large_binary")
            continue
        features[name] = datasets.List(datasets.Value(str(dtype).removeprefix("torch.")), length=length)
    for name, column in _input_columns(inputs, views.spec).items():
        if column.is_list:
            kind = {"str": "string", "int": "int64", "float": "float64", "bool": "bool"}[column.dtype]
            features[name] = datasets.Value(kind)
        else:
            length = int(np.prod(column.shape, dtype=np.int64))
            value = datasets.Value(column.stored_as)
            features[name] = value if column.shape == () else datasets.List(value, length=length)
    return datasets.Features(features)


def _fixed_size_list(rows: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])


def _sizes(manifest: Manifest) -> dict[str, int]:
    sizes = {shard.name: shard.bytes for shard in manifest.shards}
    return sizes | {name: entry["bytes"] for name, entry in manifest.files.items()}


def _tensor_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
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
    """Raises OSError, saying what to do, if stores cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise OSError(
            f"the feature cache directory {directory} is not writable ({error}): set feature_cache_dir to one that is "
            "or use cache='never'."
        ) from error
