"""A store that is written in any order, sample by sample, before it becomes one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from transformers.utils import logging

from ..cache.codec import Codec, make_codec
from ..cache.completing import small_files
from ..cache.directories import StoreInUse, create_aside, discard_aside, rename_aside
from ..cache.leases import Lease, describe, holders
from ..cache.manifest import Shard, StoreError
from ..cache.names import MANIFEST, parse_note, partial_path, shard_name
from ..cache.rows import ChosenRows, split_batch
from ..cache.shards import ShardWriter
from ..cache.store import FeatureStore
from ..cache.view_columns import ViewColumns
from ..distributed import Announcer, Group
from ..rng import preserve_rng
from .errors import BuildFailed, NotWritable
from .feature_sources import ViewRun, check_rows
from .materialize import (
    check_geometry,
    check_inputs,
    check_limit,
    claim,
    complete_store,
    fit_codec,
    make_manifest,
    need_writable,
    open_everywhere,
    open_matching,
    store_bytes,
)
from .row_columns import RowColumns, pick_rows, row_checksum, whole_lines
from .store_spec import StoreSpec

logger = logging.get_logger(__name__)

#: File in the manifest's place until the store is finished: nobody takes the directory for a store.
SPEC = "spec.json"
_MARKS = "marks"


class PartialStore:
    """The directory `<fingerprint>.partial`: the rows of a future store, of fixed size, written in any order.

    All processes share it, and it outlives them. Per view it has one file of rows (all columns side by side), and all
    views have one file of marks: a row's mark is the checksum of its bytes and follows them, so that a row counts only
    if it is whole, whoever was killed or wrote it twice. Rows are written by `pwrite` into space that was reserved: a
    full disk is an error here, where it would be a signal in mapped memory. Inputs that are lists (strings have no
    fixed size) go to a file of lines per process, and into the checksum.

    Args:
        spec: settled; its feature source computes what is missing in the end.
        group: the processes.
        codec: fitted.

    Attributes:
        reserved: bytes of this directory and of the store made of it, which exist together in the end.
        reopened: whether another run has written rows of it, or may have.
    """

    def __init__(self, spec: StoreSpec, group: Group, codec: Codec):
        self.spec, self.group, self.codec, self.reserved = spec, group, codec, 0
        self.reopened = False
        self.views = ViewColumns(spec.views, codec)
        self.probe = split_batch(spec.source.probe(), spec.chain.main_input)
        self.path = partial_path(spec.path)
        self._columns = [RowColumns(view, self.views, codec, self.probe) for view in range(spec.views.count + 1)]
        self._files: list[int] = []
        self._lease: Lease | None = None
        self._lines: TextIO | None = None
        # List inputs of samples and views, from whoever has written some; None: not read since rows were written.
        self._all_lines: Mapping[tuple[int, int], set[str]] | None = None

    @classmethod
    def begin(cls, spec: StoreSpec, group: Group) -> PartialStore:
        """Fits the codec and reserves the space. Where another run has begun the same store, both write it together.

        Raises:
            NotWritable: on every process, if nothing can be written to the directory.
            BuildFailed: if some process cannot write there.
            OverLimit: on every process, if store and directory together would take more than `spec.limit`.
        """
        try:
            with preserve_rng():
                need_writable(spec, group)
                codec = make_codec(spec.codec, spec.layout)

                def fit() -> dict[str, torch.Tensor]:
                    fit_codec(spec, codec)
                    return codec.tensors()

                codec.load_tensors(group.on_main(fit))
                partial = cls(spec, group, codec)
                partial._reserve()
                check_limit(spec, partial.reserved)
                if not group.on_main(partial._create):
                    others = cls.reopen(spec, group)
                    if others is None:
                        raise OSError(f"{partial.path} was begun by another run, which has ended: try again.")
                    return others
                group.on_all(partial._open)
                return partial
        except NotWritable:
            raise
        except OSError as error:
            raise BuildFailed(str(error)) from error

    @classmethod
    def reopen(cls, spec: StoreSpec, group: Group) -> PartialStore | None:
        """Goes on with what another run of the same training has left; None if there is nothing that matches.

        Args:
            spec: views and notes need not be settled; they are what was settled then.
            group: the processes.

        Raises:
            BuildFailed: if files cannot be read, or not by every process.
        """
        path = partial_path(spec.path)

        def read_settings() -> tuple[Any, ...] | None:
            if not path.exists():
                return None
            try:
                begun = FeatureStore.open(path, SPEC)
                names = [note for file in begun.manifest.files if (note := parse_note(file)) is not None]
                notes = {note: begun.read_note(note) or {} for note in names}
                settled = replace(spec, views=begun.views.spec, notes=notes)
                partial = cls(settled, group, begun.codec)
                expected = make_manifest(settled, partial.probe, [])
                if replace(begun.manifest, files={}).to_json() != expected.to_json():
                    raise StoreError(f"{path} was begun for another store.")
                partial._check_sizes()
            except StoreError as error:
                others = describe(holders(path, own=False))
                if others:
                    raise StoreInUse(f"{error} It is in use by {others}.") from error
                Announcer(group, logger).warning(f"A feature store that was begun is begun again: {error}")
                shutil.rmtree(path)
                return None
            return begun.codec.tensors(), settled.views, settled.notes

        try:
            with preserve_rng():
                settings = group.on_main(read_settings)
                if settings is None:
                    return None
                tensors, views, notes = settings
                codec = make_codec(spec.codec, spec.layout).load_tensors(tensors)
                partial = cls(replace(spec, views=views, notes=notes), group, codec)
                partial.reopened = True
                partial._reserve()
                group.on_all(partial._open)
                return partial
        except OSError as error:
            raise BuildFailed(str(error)) from error

    def _reserve(self) -> None:
        # Only the main process has the notes.
        finished = self.group.on_main(lambda: store_bytes(self.spec, self.codec, self.probe, self.group.size))
        self.reserved = self.bytes + finished

    @property
    def bytes(self) -> int:
        """Bytes that the files of rows and marks take."""
        rows = len(self.spec.source)
        return rows * sum(columns.width for columns in self._columns) + rows * len(self._columns) * 4

    def write(self, samples: Sequence[int], views: np.ndarray, view_run: ViewRun) -> None:
        """Writes one view of each of some samples; what was written of it before is replaced.

        Args:
            samples: row numbers `(B,)`.
            views: int64 `(B,)`, 0 being the base view.
            view_run: the batch; geometry of base views is ignored.

        Raises:
            GeometryMisfit: if a view's geometry cannot be stored as the spec says.
            ValueError: if a feature is not finite (the sample is named) or the batch cannot be kept per row.
            OSError: if it cannot be written.
        """
        check_inputs(view_run, self.probe, samples[0])
        check_rows(len(view_run.need_features()), samples)
        for view in np.unique(views):
            positions = np.flatnonzero(views == view)
            of_view = [samples[position] for position in positions.tolist()]
            self._put(int(view), of_view, pick_rows(view_run, positions))

    def finish(self) -> FeatureStore:
        """Computes the missing rows and writes the store, every process its shard; then deletes the directory.

        Raises:
            BuildFailed: if some process could not write.
            GeometryMisfit: on every process, if a missing view's geometry cannot be kept as the spec says.
            ValueError: if a missing feature is not finite or a batch cannot be kept per row.
        """
        spec, group = self.spec, self.group
        try:
            with preserve_rng():
                store = open_matching(spec, group)  # another training of the same settings may have been faster
                if store is None:
                    group.on_all(self._fill)
                    store = self._write_store()
        except OSError as error:
            raise BuildFailed(str(error)) from error
        self.remove()
        return store

    def remove(self) -> None:
        """Deletes the directory, on all processes together; leaves it to other runs that write to it."""
        self.close()
        self.group.gather(None)  # nobody has it open any more
        if self.group.is_main and not holders(self.path, own=False):
            shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Closes the files; the directory stays for a resumed training."""
        for descriptor in self._files:
            os.close(descriptor)
        if self._lines is not None:
            self._lines.close()
        self._files, self._lines = [], None
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    # Files

    def _sizes(self) -> dict[str, int]:
        rows = len(self.spec.source)
        sizes = {f"view-{view}.rows": rows * columns.width for view, columns in enumerate(self._columns)}
        return {**sizes, _MARKS: 4 * rows * len(self._columns)}

    def _create(self) -> bool:
        """Makes the directory; False if another run has made it meanwhile."""
        aside = create_aside(self.path)
        try:
            manifest = make_manifest(self.spec, self.probe, [])
            contents = small_files(self.codec, self.views, manifest, self.spec.notes)
            contents[SPEC] = contents.pop(MANIFEST)
            for name, content in contents.items():
                (aside / name).write_bytes(content)
            for name, size in self._sizes().items():
                with open(aside / name, "wb") as file:
                    file.truncate(size)
                    if size and hasattr(os, "posix_fallocate"):  # not on macOS: a full disk is found out later there
                        os.posix_fallocate(file.fileno(), 0, size)
            rename_aside(aside, self.path)
        except BaseException as error:
            discard_aside(aside)
            if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False
            raise
        return True

    def _check_sizes(self) -> None:
        for name, size in self._sizes().items():
            actual = (self.path / name).stat().st_size if (self.path / name).is_file() else None
            if actual != size:
                raise StoreError(f"{self.path / name} has {actual} bytes instead of {size}.")

    def _open(self) -> None:
        *rows, marks = self._sizes()
        try:
            self._files = [os.open(self.path / name, os.O_RDWR | os.O_NOFOLLOW) for name in (*rows, marks)]
        except FileNotFoundError as error:
            raise OSError(f"{error}. The feature cache directory must be one that all processes see.") from error
        if self.group.is_main:
            self._lease = Lease.take(self.path)

    def _write_at(self, file: int, content: memoryview, offset: int) -> None:
        while content:
            written = os.pwrite(self._files[file], content, offset)
            content, offset = content[written:], offset + written

    def _read_at(self, file: int, size: int, offset: int) -> bytearray:
        content = bytearray()
        while len(content) < size:
            part = os.pread(self._files[file], size - len(content), offset + len(content))
            if not part:
                raise OSError(f"{self.path} was cut short.")
            content += part
        return content

    # Writing

    def _put(self, view: int, samples: Sequence[int], view_run: ViewRun) -> None:
        if view and not self.spec.views.whole:
            check_geometry([view_run], samples)
        if view:
            codes = self.views.encode(view, view_run.features, view_run.geometry, samples)
        else:
            codes = self.codec.encode(view_run.need_features(), sample_ids=samples)
        columns = self._columns[view]
        rows, lists = columns.pack(codes, view_run.columns, samples)
        if columns.lists:
            self._write_lines(view, samples, lists)
        for sample, row, values in zip(samples, rows, lists, strict=True):
            self._write_at(view, row.data, sample * columns.width)
            mark = np.uint32(row_checksum(row.data, values)).tobytes()
            self._write_at(-1, memoryview(mark), 4 * (view * len(self.spec.source) + sample))

    def _write_lines(self, view: int, samples: Sequence[int], lists: Sequence[str]) -> None:
        if self._lines is None:
            self._lines = open(self.path / f"lists-{uuid.uuid4().hex}.jsonl", "w", encoding="utf-8")
        for sample, values in zip(samples, lists, strict=True):
            self._lines.write(json.dumps([sample, view, values]) + "\n")
        self._lines.flush()

    # Finishing

    def _fill(self) -> None:
        """Computes what is missing in this process's ranges."""
        mine = self.group.my_ranges(self.spec.source.num_ranges)
        if not len(mine):
            return
        first, last = self.spec.source.rows(mine[0])[0], self.spec.source.rows(mine[-1])[-1]
        lacking = np.stack([self._read_marks(view, first, last) == 0 for view in range(len(self._columns))])
        rows = np.flatnonzero(lacking.any(0)) + first
        self._compute(rows.tolist(), lambda view, row: lacking[view, row - first])

    def _compute(self, rows: Sequence[int], is_lacking: Callable[[int, int], bool]) -> None:
        """Runs the prefix on rows and writes the views of them that are lacking."""
        views = self.spec.views
        source = ChosenRows(self.spec.source, rows)
        features = self.spec.feature_source.over(source)
        needed = views.needs_features(self.spec.layout)
        for number, view_runs in features.run(range(source.num_ranges), views.count, views.geometry, needed):
            samples = source.rows(number)
            for view, view_run in enumerate(view_runs):
                check_inputs(view_run, self.probe, samples[0])
                positions = np.array([place for place, row in enumerate(samples) if is_lacking(view, row)], np.int64)
                if len(positions):
                    self._put(view, [samples[place] for place in positions], pick_rows(view_run, positions))

    def _write_store(self) -> FeatureStore:
        spec, group = self.spec, self.group
        aside = claim(spec, group)
        if isinstance(aside, FeatureStore):  # another training of the same settings was faster
            return aside
        try:
            shards = group.gather(group.on_all(lambda: self._write_shard(aside)))
            group.on_main(lambda: complete_store(spec, aside, self.codec, self.probe, shards))
        except BaseException:
            if group.is_main:
                discard_aside(aside)
            raise
        return open_everywhere(spec, group)

    def _write_shard(self, aside: Path) -> Shard:
        source = self.spec.source
        path = aside / shard_name(self.group.rank, self.group.size)
        with ShardWriter(path, self.codec, self.views, self.probe.describe(), self.spec.lossless) as writer:
            for number in self.group.my_ranges(source.num_ranges):
                samples = source.rows(number)
                codes: dict[str, torch.Tensor] = {}
                inputs: dict[str, Any] = {}
                for view in range(len(self._columns)):
                    read_codes, read_inputs = self._read(view, samples)
                    codes, inputs = codes | read_codes, inputs | read_inputs
                writer.write(samples[0], codes, inputs)
        return writer.shard()

    def _read(self, view: int, samples: Sequence[int]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Codes and model inputs of one view of a range; rows that are damaged are computed again."""
        columns = self._columns[view]
        for attempt in range(2):
            content = self._read_at(view, len(samples) * columns.width, samples[0] * columns.width)
            rows = np.frombuffer(content, np.uint8).reshape(len(samples), columns.width)
            marks = self._read_marks(view, samples[0], samples[-1])
            lists = [self._lists_of(view, *row) for row in zip(samples, rows, marks, strict=True)]
            whole = [values for values in lists if values is not None]
            if len(whole) == len(lists):
                return columns.unpack(rows, whole)
            damaged = {sample for sample, values in zip(samples, lists, strict=True) if values is None}
            if attempt == 0:
                self._compute(sorted(damaged), lambda own, row: own == view)
                self._all_lines = None
        raise OSError(
            f"{self.path} does not keep what is written to it: samples {sorted(damaged)[:3]} of view {view}."
        )

    def _lists_of(self, view: int, sample: int, row: np.ndarray, mark: int) -> str | None:
        """A row's list inputs, with which its checksum fits; None if none do: the row is not whole."""
        candidates: Iterable[str] = ("[]",)
        if self._columns[view].lists:
            self._all_lines = self._read_lines() if self._all_lines is None else self._all_lines
            candidates = self._all_lines.get((sample, view), ())
        return next((values for values in candidates if row_checksum(row.data, values) == mark), None)

    def _read_lines(self) -> Mapping[tuple[int, int], set[str]]:
        lists: dict[tuple[int, int], set[str]] = {}
        for path in sorted(self.path.glob("lists-*.jsonl")):
            for sample, view, values in whole_lines(path):
                lists.setdefault((sample, view), set()).add(values)
        return lists

    def _read_marks(self, view: int, first: int, last: int) -> np.ndarray:
        offset = 4 * (view * len(self.spec.source) + first)
        return np.frombuffer(self._read_at(-1, 4 * (last - first + 1), offset), np.uint32)
