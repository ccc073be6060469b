"""A store of features on disk, opened for reading its rows."""

from __future__ import annotations

import contextlib
import os
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import safetensors.torch
import torch

from .codec import Codec
from .directories import create_aside, remove_store  # noqa: F401 - they belong to a store's life
from .held_files import FileState, HeldFile, Readable, open_file
from .leases import Lease
from .manifest import Manifest, StoreError, translated
from .names import (
    DATASET_STATE_FILE,
    MANIFEST,
    OWNER,
    is_shard,
    note_file,
    own_input,
)
from .opening import check_state, open_columns, open_files
from .rows import InputColumn
from .shares import Share
from .stored_columns import PackedColumn, TokenColumn
from .texts import decode_rows, split_rows
from .view_columns import ViewColumns


class FeatureStore:
    """A complete store, opened for reading.

    Its files are held open: rows can be read as long as this object lives, also after somebody removed the store, and
    in every process that this one starts. A file that was cut short or changed meanwhile is a `StoreError`.

    Args:
        path: its directory.
        manifest: its contents.
        codec: the fitted codec.
        views: columns of the augmented views.
        files: its files that are held open, by name: the Arrow files, and those that another process opens it with.

    Raises:
        StoreError: if the Arrow files are not those that the manifest describes.
    """

    def __init__(
        self, path: Path, manifest: Manifest, codec: Codec, views: ViewColumns, files: Mapping[str, Readable]
    ):
        self.path, self.manifest, self.codec, self.views = path, manifest, codec, views
        self._files = files
        self._shards = [file for name, file in files.items() if is_shard(name)]
        self._columns = open_columns(self._shards, manifest, codec, views, path) if self._shards else {}
        self._selected: np.ndarray | None = None
        self._lease: Lease | None = None
        #: Whose rows these are, where a node stores its share; None: as many as the data set has.
        self.share: Share | None = None
        self._enter()

    def _enter(self) -> None:
        self._key = uuid.uuid4().hex
        _OPENED[self._key] = self

    @classmethod
    def open(cls, path: str | os.PathLike, manifest_name: str = MANIFEST) -> FeatureStore:
        """Opens a store. Checks the manifest, the checksums of the small files, and sizes and columns of the shards.

        Args:
            path: directory of the store.
            manifest_name: file name of the manifest; a directory that is not complete has another one.

        Raises:
            StoreError: if a file is missing, edited or no file of a store, or the store is of another version. Damage
                inside a shard is found by `verify`.
            OSError: if the disk fails, or the process may not read the files.
        """
        path = Path(path)
        if not (path / manifest_name).is_file():
            raise StoreError(f"{path} is not a feature store: it has no {manifest_name}.")
        store = cls(path, *open_files(path, lambda name: open_file(path / name), manifest_name))
        store._check_small_files()
        return store

    def __reduce__(self):
        # Open files cannot be pickled: the other process opens those of this one.
        return _reopen, (self.handle, self._selected)

    def __len__(self) -> int:
        return self.manifest.rows if self._selected is None else len(self._selected)

    def select(self, rows: Sequence[int] | np.ndarray) -> FeatureStore:
        """The same store, whose row numbers are places in a selection; manifest, files and notes are those of it all.

        Args:
            rows: row numbers of this store `(N,)`, in any order.

        Raises:
            IndexError: if a row does not exist.

        Shapes: N rows of the selection.
        """
        return self._with_rows(self._numbers(rows), None)

    def spread(self, share: Share) -> FeatureStore:
        """The same store, whose row numbers are those of the data set of which it holds a share.

        Args:
            share: which rows it holds. The others are a `StoreError` when they are read.
        """
        return self._with_rows(share.places(), share)

    @property
    def packed(self) -> FeatureStore:
        """The same store with the row numbers that it has by itself, whatever `select` or `spread` has made of it."""
        return self if self._selected is None else self._with_rows(None, None)

    def _with_rows(self, selected: np.ndarray | None, share: Share | None) -> FeatureStore:
        chosen = FeatureStore.__new__(FeatureStore)
        vars(chosen).update(vars(self))
        chosen._selected, chosen.share, chosen._lease = selected, share, None
        chosen._enter()
        return chosen

    @property
    def is_selection(self) -> bool:
        """Whether it is what `select` returned."""
        return self._selected is not None and self.share is None

    def _numbers(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Row numbers of the whole store."""
        rows = np.asarray(indices, dtype=np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {self.path}, which has {len(self)}.")
        if self._selected is None:
            return rows
        places = self._selected[rows]
        if self.share is not None and len(places) and places.min() < 0:
            absent = rows[places < 0]
            raise StoreError(f"row {absent[0]} is not among the rows that this node stores in {self.path}.")
        return places

    @property
    def handle(self) -> StoreHandle:
        """What a process that this one has started, or starts, opens the store with."""
        files = {name: file for name, file in self._files.items() if isinstance(file, HeldFile)}
        held = tuple((file.path.name, file.descriptor, file.state) for file in files.values())
        manifest = files[MANIFEST].sha256
        return StoreHandle(self.path, self._key, os.getpid(), manifest, held, self.is_selection, self.share)

    @property
    def bytes(self) -> int:
        """Size of the Arrow files, in bytes."""
        return sum(shard.bytes for shard in self.manifest.shards)

    @property
    def total_bytes(self) -> int:
        """Size of all files, in bytes."""
        owner = self.path / OWNER
        noted = owner.stat().st_size if owner.is_file() else 0
        return sum(_sizes(self.manifest).values()) + self._files[MANIFEST].size + noted

    @property
    def dataset(self) -> datasets.Dataset:
        """The store as a `datasets.Dataset`, memory-mapped: for people. Nothing in a training reads it.

        Raises:
            StoreError: if its files are gone or damaged.
        """
        with translated(f"{self.path} cannot be opened with `datasets`"):
            return datasets.load_from_disk(str(self.path), keep_in_memory=False)

    def verify(self) -> bool:
        """Reads every file and compares its sha256 with that of the manifest.

        Returns:
            True.

        Raises:
            StoreError: if a file does not match; the message names it.
        """
        self.manifest.check()
        self._check_small_files()
        for shard in self._shards:
            shard.verify()
        return True

    def check_unchanged(self) -> None:
        """Verifies the Arrow files that anybody has changed since they were verified or opened; nearly free if none.

        A store whose files were removed is unchanged: it is read on.

        Raises:
            StoreError: if a file has another content, or cannot be read; the message names it.
        """
        for shard in self._shards:
            shard.check_unchanged()

    def hold(self) -> None:
        """Tells other runs that this process uses the store, until `release`: they do not delete it.

        Does nothing where nothing can be written to the directory.
        """
        if self._lease is None:
            self._lease = Lease.take(self.path)

    def release(self) -> None:
        """Takes back what `hold` told. The store can still be read."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def read(self, indices: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
        """Reads and decodes the base view of some samples.

        Args:
            indices: row numbers `(B,)`.
            device: where the features are decoded.

        Returns:
            Features `(B, *layout.shape)`; of texts `(B, W, C)`, with 0 behind the last token.

        Raises:
            IndexError: if a row does not exist.
            StoreError: if a row is damaged, or a file changed or cannot be read.

        Shapes: B samples, W tokens of the longest text.
        """
        rows = self.read_rows(indices)
        codes = split_rows(rows) if self.codec.layout.is_token else {name: rows[name] for name in self.codec.columns}
        return decode_rows(self.codec, {name: value.to(device) for name, value in codes.items()})

    def read_rows(
        self, indices: Sequence[int], views: np.ndarray | None = None, pinned: bool = False
    ) -> dict[str, Any]:
        """Reads codes and model inputs of some samples, without decoding them.

        Args:
            indices: row numbers `(B,)`.
            views: int64 `(B,)`, view of each sample; None: the base view.
            pinned: whether the base view's codes are read into page-locked memory, from which a GPU copies directly.

        Returns:
            Entries of a batch by name: first the codes, i.e. the codec's columns and, for stores that hold only the
            sensitive channels of views, the entries of `ViewColumns.pick`; then the model inputs. Of texts the codes
            of all tokens, one after the other, and what `split_texts` tells of them.

        Raises:
            IndexError: if a row does not exist.
            StoreError: if a row is damaged, or a file changed or cannot be read.

        Shapes: B samples.
        """
        self.check_unchanged()
        rows = self._numbers(indices)
        # A tensor that torch has pinned must itself go into the batch: torch reuses its memory once no copy to a GPU
        # is under way, and knows of copies by the tensor.
        lengths = {} if self.codec.layout.is_token else self.codec.columns
        memory = {
            name: torch.empty(len(rows), length, dtype=dtype, pin_memory=pinned)
            for name, (dtype, length) in lengths.items()
        }
        codes = {name: self._columns[name].take(rows, tensor.numpy()) for name, tensor in memory.items()}
        if self.codec.layout.is_token:
            codes = {name: self._columns[name].take(rows) for name in self.codec.columns}
        if views is not None and self.manifest.views:
            codes = self.views.pick(codes, views, lambda name, positions: self._columns[name].take(rows[positions]))
        batch: dict[str, Any] = {
            name: memory[name] if name in memory else torch.from_numpy(value) for name, value in codes.items()
        }
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
            Name -> `(B, length)`; codes of texts `(N, length)`, those of all tokens.

        Raises:
            IndexError: if a row does not exist.
            StoreError: if a row is damaged or cannot be read.

        Shapes: B samples.
        """
        rows = self._numbers(indices)
        return {name: torch.from_numpy(self._columns[name].take(rows)) for name in names}

    def read_input(self, name: str, column: InputColumn, indices: Sequence[int] | np.ndarray) -> Any:
        """Reads a column of model inputs: a tensor `(B, *column.shape)`, or a list.

        Args:
            name: of the column; of one that a view has for itself, as `own_input` writes it.
            column: what it holds.
            indices: row numbers `(B,)`.

        Raises:
            IndexError: if a row does not exist.
            StoreError: if a row is damaged or cannot be read.

        Shapes: B samples.
        """
        return self._take_input(name, column, self._numbers(indices))

    def _take_input(self, name: str, column: InputColumn, rows: np.ndarray) -> Any:
        values = self._columns[name].take(rows)
        if not column.is_list:
            return column.to_tensor(values)
        return values[:, 0].tolist() if isinstance(values, np.ndarray) else values

    def read_note(self, name: str) -> dict[str, torch.Tensor] | None:
        """Tensors for people and tools; None if the store has no such note.

        Args:
            name: of the note, e.g. `sensitivity`.

        Raises:
            StoreError: if its file is missing or damaged.
        """
        entry = self.manifest.files.get(note_file(name))
        if entry is None:
            return None
        path = self.path / note_file(name)
        with contextlib.closing(HeldFile(path, open_file(path), entry["bytes"], entry["sha256"])) as file:
            file.verify()
            with translated(f"{path} does not hold tensors"):
                return safetensors.torch.load(file.read(file.size, 0))

    def frame_bytes(self) -> dict[str, float]:
        """Mean size of a packed row in bytes, by column; empty if rows are not packed."""
        return {
            name: column.frame_bytes
            for name, column in self._columns.items()
            if isinstance(column, PackedColumn) or (isinstance(column, TokenColumn) and column.is_packed)
        }

    def code_names(self, batch: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the codes among the entries that `read_rows` returned."""
        return tuple(
            name for name in batch if name not in self.manifest.inputs and name not in self.manifest.constants
        )

    def _read_input(self, name: str, column: InputColumn, rows: np.ndarray, views: np.ndarray | None) -> Any:
        values = self._take_input(name, column, rows)
        if views is None or not self.manifest.own_inputs:
            return values
        for view in np.unique(views[views > 0]):
            positions = np.flatnonzero(views == view)
            own = self._take_input(own_input(view, name), column, rows[positions])
            for position, value in zip(positions, own, strict=True):
                values[position] = value
        return values

    def _check_small_files(self) -> None:
        for name, entry in self.manifest.files.items():
            file = HeldFile(self.path / name, open_file(self.path / name), entry["bytes"], entry["sha256"])
            with contextlib.closing(file):
                file.verify()
                if name == DATASET_STATE_FILE:
                    check_state(file, self.manifest)


#: Stores that this process has opened, for the handles that come back to it.
_OPENED: weakref.WeakValueDictionary[str, FeatureStore] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class StoreHandle:
    """A store that a process holds open, as a value for the processes that it starts.

    They open the very same files, whatever has happened to their names since.

    Args:
        path: directory of the store.
        key: names the opened store within that process and its forks.
        process: number of the process.
        manifest: sha256 of the manifest.
        files: name, descriptor and verified state of each file.
        is_selection: whether it is some of its rows; which ones, the data set tells.
        share: the rows that a node's store holds; None: all.
    """

    path: Path
    key: str
    process: int
    manifest: str
    files: tuple[tuple[str, int, FileState], ...]
    is_selection: bool = False
    share: Share | None = None

    def open(self) -> FeatureStore:
        """Opens the store in this process, with all of its rows, or returns it if it is open here.

        Raises:
            StoreError: if it cannot be opened, or is another one by now.
        """
        opened = _OPENED.get(self.key)
        if opened is not None:
            return opened
        descriptors = {name: descriptor for name, descriptor, _ in self.files}
        states = {name: state for name, _, state in self.files}

        def open_theirs(name: str) -> int:
            return os.open(f"/proc/{self.process}/fd/{descriptors[name]}", os.O_RDONLY | os.O_CLOEXEC)

        def open_by_name(name: str) -> int:
            return open_file(self.path / name)

        try:
            store = self._open(open_theirs, states)
        except (OSError, KeyError, StoreError) as problem:
            # The other process is gone, or the system has no /proc.
            try:
                store = self._open(open_by_name, states)
            except OSError as error:
                raise StoreError(f"{self.path} cannot be opened in another process: {error}.") from problem
        store._key = self.key
        _OPENED[self.key] = store
        return store

    def _open(self, open_one: Callable[[str], int], states: Mapping[str, FileState]) -> FeatureStore:
        opened = open_files(self.path, open_one, MANIFEST, states)
        if opened.files[MANIFEST].sha256 != self.manifest:
            raise StoreError(f"{self.path} is another store by now: it was built again while it was in use.")
        return FeatureStore(self.path, *opened)


def _reopen(handle: StoreHandle, rows: np.ndarray | None) -> FeatureStore:
    store = handle.open()
    if handle.share is not None:
        return store if store.share is not None else store.spread(handle.share)
    return store if rows is None or store.is_selection else store.select(rows)


def _sizes(manifest: Manifest) -> dict[str, int]:
    sizes = {shard.name: shard.bytes for shard in manifest.shards}
    return sizes | {name: entry["bytes"] for name, entry in manifest.files.items()}
