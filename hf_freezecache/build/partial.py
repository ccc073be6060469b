"""A store that is written in any order, sample by sample, before it becomes one."""

from __future__ import annotations

import json
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from transformers.utils import logging

from ..cache.codec import Codec, make_codec
from ..cache.manifest import Shard, StoreError
from ..cache.names import CODEC_FILE, MANIFEST, own_input, shard_name
from ..cache.rows import ChosenRows, InputColumn, split_batch
from ..cache.shards import ShardWriter, stored_rows
from ..cache.store import FeatureStore, create_aside, small_files
from ..cache.view_columns import ViewColumns
from ..distributed import Group
from ..rng import preserve_rng
from .feature_sources import ViewRun
from .materialize import (
    BuildFailed,
    GeometryMisfit,
    check_inputs,
    check_limit,
    complete_store,
    find_misfit,
    fit_codec,
    make_manifest,
    open_everywhere,
    open_matching,
    store_bytes,
)
from .store_spec import StoreSpec

logger = logging.get_logger(__name__)

#: What stands for the manifest until the store is finished: nobody takes the directory for a store.
PLAN = "spec.json"
_MARKS = "marks"
_SUFFIX = ".partial"


class PartialStore:
    """The directory `<fingerprint>.partial`: what a spec will keep, in rows of fixed size that may come in any order.

    All processes share it, and it outlives them. Per view it has one file of rows (all columns side by side), and all
    views have one file of marks: a row's mark is the checksum of its bytes and follows them, so that a row counts only
    if it is whole, whoever was killed or wrote it twice. Rows are written by `pwrite` into space that was reserved: a
    full disk is an error here, where it would be a signal in mapped memory. Inputs that are lists (strings have no
    fixed size) go to a file of lines per process, and into the checksum.

    Args:
        spec: settled; its `runs` compute what is missing in the end.
        group: the processes.
        codec: fitted.

    Attributes:
        reserved: bytes of this directory and of the store made of it, which lie there together in the end.
    """

    def __init__(self, spec: StoreSpec, group: Group, codec: Codec):
        self.spec, self.group, self.codec, self.reserved = spec, group, codec, 0
        self.views = ViewColumns(spec.views, codec)
        self.probe = split_batch(spec.source.probe(), spec.chain.main_input)
        self.path = partial_path(spec)
        self._columns = [_RowColumns(self, view) for view in range(spec.views.count + 1)]
        self._files: list[int] = []
        self._marks, self._lines = -1, None

    @classmethod
    def begin(cls, spec: StoreSpec, group: Group) -> PartialStore:
        """Fits the codec and reserves the space.

        Raises:
            BuildFailed: if some process cannot write there.
            OverLimit: on every process, if store and directory together would take more than `spec.limit`.
        """
        try:
            with preserve_rng():
                codec = make_codec(spec.codec, spec.layout)

                def fit() -> dict[str, torch.Tensor]:
                    fit_codec(spec, codec)
                    return codec.tensors()

                codec.load_tensors(group.on_main(fit))
                partial = cls(spec, group, codec)
                partial._reserve()
                check_limit(spec, partial.reserved)
                group.on_main(partial._create)
                group.on_all(partial._open)
                return partial
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
        path = partial_path(spec)

        def find() -> tuple[Any, ...] | None:
            if not path.exists():
                return None
            try:
                kept = FeatureStore.open(path, PLAN)
                notes = [name for name in kept.manifest.files if name.endswith(".safetensors") and name != CODEC_FILE]
                notes = {name: safetensors.torch.load_file(path / name) for name in notes}
                settled = replace(spec, views=kept.views.spec, notes={Path(name).stem: notes[name] for name in notes})
                partial = cls(settled, group, kept.codec)
                expected = make_manifest(settled, partial.probe, [])
                if replace(kept.manifest, files={}).to_json() != expected.to_json():
                    raise StoreError(f"{path} was begun for another store.")
                partial._check_sizes()
            except StoreError as error:
                logger.warning(f"A feature store that was begun is begun again: {error}")
                shutil.rmtree(path)
                return None
            return kept.codec.tensors(), settled.views, settled.notes

        try:
            with preserve_rng():
                found = group.on_main(find)
                if found is None:
                    return None
                tensors, views, notes = found
                codec = make_codec(spec.codec, spec.layout).load_tensors(tensors)
                partial = cls(replace(spec, views=views, notes=notes), group, codec)
                partial._reserve()
                group.on_all(partial._open)
                return partial
        except OSError as error:
            raise BuildFailed(str(error)) from error

    def _reserve(self) -> None:
        # The notes are the main process's.
        finished = self.group.on_main(lambda: store_bytes(self.spec, self.codec, self.probe, self.group.size))
        self.reserved = self.bytes + finished

    @property
    def bytes(self) -> int:
        """Bytes that the files of rows and marks take."""
        rows = len(self.spec.source)
        return rows * sum(columns.width for columns in self._columns) + rows * len(self._columns) * 4

    def write(self, samples: Sequence[int], views: np.ndarray, ran: ViewRun) -> None:
        """Keeps one view of each of some samples; what was kept of it before is replaced.

        Args:
            samples: row numbers `(B,)`.
            views: int64 `(B,)`, 0 being the base view.
            ran: the batch; geometry of base views is ignored.

        Raises:
            GeometryMisfit: if a view's geometry cannot be kept as the spec says.
            ValueError: if a feature is not finite (the sample is named) or the batch cannot be kept per row.
            OSError: if it cannot be written.
        """
        check_inputs(ran, self.probe, samples[0])
        for view in np.unique(views):
            positions = np.flatnonzero(views == view)
            self._put(int(view), [samples[position] for position in positions], _rows_of(ran, positions))

    def finish(self) -> FeatureStore:
        """Computes what is missing, writes the store as a build does, every process its shard, and goes away.

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
                    misfits = [misfit for misfit in group.together(self._fill) if misfit is not None]
                    if misfits:
                        raise GeometryMisfit(misfits[0])
                    store = self._write_store()
        except OSError as error:
            raise BuildFailed(str(error)) from error
        self.remove()
        return store

    def remove(self) -> None:
        """Takes the directory away, on all processes together."""
        self.close()
        self.group.gather(None)  # nobody has it open any more
        if self.group.rank == 0:
            shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Lets go of the files; the directory stays for a resumed training."""
        for descriptor in self._files:
            os.close(descriptor)
        if self._lines is not None:
            self._lines.close()
        self._files, self._lines = [], None

    # Files

    def _sizes(self) -> dict[str, int]:
        rows = len(self.spec.source)
        sizes = {f"view-{view}.rows": rows * columns.width for view, columns in enumerate(self._columns)}
        return {**sizes, _MARKS: 4 * rows * len(self._columns)}

    def _create(self) -> None:
        aside = create_aside(self.path)
        try:
            manifest = make_manifest(self.spec, self.probe, [])
            contents = small_files(self.codec, self.views, manifest, self.spec.notes)
            contents[PLAN] = contents.pop(MANIFEST)
            for name, content in contents.items():
                (aside / name).write_bytes(content)
            for name, size in self._sizes().items():
                with open(aside / name, "wb") as file:
                    file.truncate(size)
                    if size and hasattr(os, "posix_fallocate"):  # not on macOS: a full disk is found out later there
                        os.posix_fallocate(file.fileno(), 0, size)
            os.rename(aside, self.path)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise

    def _check_sizes(self) -> None:
        for name, size in self._sizes().items():
            found = (self.path / name).stat().st_size if (self.path / name).is_file() else None
            if found != size:
                raise StoreError(f"{self.path / name} has {found} bytes instead of {size}.")

    def _open(self) -> None:
        *rows, marks = self._sizes()
        try:
            self._files = [os.open(self.path / name, os.O_RDWR) for name in (*rows, marks)]
        except FileNotFoundError as error:
            raise OSError(f"{error}. The feature cache directory must be one that all processes see.") from error

    def _write_at(self, file: int, content: memoryview | bytes, offset: int) -> None:
        content = memoryview(content)
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

    def _put(self, view: int, samples: Sequence[int], ran: ViewRun) -> None:
        if view and not self.spec.views.whole:
            misfit = find_misfit([ran], samples)
            if misfit is not None:
                raise GeometryMisfit(misfit)
        if view:
            codes = self.views.encode(view, ran.features, ran.geometry, samples)
        else:
            codes = self.codec.encode(ran.features, sample_ids=samples)
        columns = self._columns[view]
        rows, lists = columns.pack(codes, ran.columns, samples)
        if columns.lists:
            self._write_lines(view, samples, lists)
        for sample, row, values in zip(samples, rows, lists, strict=True):
            self._write_at(view, row.data, sample * columns.width)
            mark = np.uint32(_checksum(row.data, values)).tobytes()
            self._write_at(-1, mark, 4 * (view * len(self.spec.source) + sample))

    def _write_lines(self, view: int, samples: Sequence[int], lists: Sequence[str]) -> None:
        if self._lines is None:
            self._lines = open(self.path / f"lists-{uuid.uuid4().hex}.jsonl", "w", encoding="utf-8")
        for sample, values in zip(samples, lists, strict=True):
            self._lines.write(json.dumps([sample, view, values]) + "\n")
        self._lines.flush()

    # Finishing

    def _fill(self) -> str | None:
        """Computes what is missing of this process's share; why it cannot be kept, if a view's geometry misfits."""
        mine = self.group.share(self.spec.source.num_ranges)
        if not len(mine):
            return None
        first, last = self.spec.source.rows(mine[0])[0], self.spec.source.rows(mine[-1])[-1]
        lacking = np.stack([self._read_marks(view, first, last) == 0 for view in range(len(self._columns))])
        rows = np.flatnonzero(lacking.any(0)) + first
        return self._compute(rows.tolist(), lambda view, row: lacking[view, row - first])

    def _compute(self, rows: Sequence[int], is_lacking: Callable[[int, int], bool]) -> str | None:
        """Runs the prefix on rows and writes the views of them that are lacking."""
        views = self.spec.views
        source = ChosenRows(self.spec.source, rows)
        runs = self.spec.feature_source.over(source)
        needed = views.needs_features(self.spec.layout)
        for number, ran in runs.run(range(source.num_ranges), views.count, views.geometry, needed):
            samples = source.rows(number)
            for view, part in enumerate(ran):
                check_inputs(part, self.probe, samples[0])
                positions = np.array([place for place, row in enumerate(samples) if is_lacking(view, row)], np.int64)
                if len(positions):
                    try:
                        self._put(view, [samples[place] for place in positions], _rows_of(part, positions))
                    except GeometryMisfit as misfit:
                        return str(misfit)
        return None

    def _write_store(self) -> FeatureStore:
        spec, group = self.spec, self.group
        aside = group.on_main(lambda: create_aside(spec.path))
        try:
            shards = group.together(lambda: self._write_shard(aside))
            group.on_main(lambda: complete_store(spec, aside, self.codec, self.probe, shards))
        except BaseException:
            if group.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise
        return open_everywhere(spec, group)

    def _write_shard(self, aside: Path) -> Shard:
        source = self.spec.source
        path = aside / shard_name(self.group.rank, self.group.size)
        with ShardWriter(path, self.codec, self.views, self.probe.describe(), self.spec.lossless) as writer:
            for number in self.group.share(source.num_ranges):
                samples, codes, inputs = source.rows(number), {}, {}
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
            damaged = {sample for sample, values in zip(samples, lists, strict=True) if values is None}
            if not damaged:
                return columns.unpack(rows, lists)
            if attempt == 0:
                misfit = self._compute(sorted(damaged), lambda own, row: own == view)
                self.__dict__.pop("_all_lines", None)
                if misfit is not None:
                    raise ValueError(misfit)
        raise OSError(
            f"{self.path} does not keep what is written to it: samples {sorted(damaged)[:3]} of view {view}."
        )

    def _lists_of(self, view: int, sample: int, row: np.ndarray, mark: int) -> str | None:
        """A row's list inputs, with which its checksum fits; None if none do: the row is not whole."""
        candidates = self._all_lines.get((sample, view), ()) if self._columns[view].lists else ("[]",)
        return next((values for values in candidates if _checksum(row.data, values) == mark), None)

    @cached_property
    def _all_lines(self) -> Mapping[tuple[int, int], set[str]]:
        """List inputs of samples and views, from whoever has written some."""
        found: dict[tuple[int, int], set[str]] = {}
        for path in sorted(self.path.glob("lists-*.jsonl")):
            for sample, view, values in _whole_lines(path):
                found.setdefault((sample, view), set()).add(values)
        return found

    def _read_marks(self, view: int, first: int, last: int) -> np.ndarray:
        offset = 4 * (view * len(self.spec.source) + first)
        return np.frombuffer(self._read_at(-1, 4 * (last - first + 1), offset), np.uint32)


class _RowColumns:
    """What a row of one view consists of: columns of fixed size side by side, and lists."""

    def __init__(self, partial: PartialStore, view: int):
        spec = partial.spec.views
        if view:
            self.codes = {f"{name}_{view}": column for name, column in partial.views.entries.items()}
        else:
            self.codes = dict(partial.codec.columns)
        described = partial.probe.describe() if view == 0 or spec.own_inputs else {}
        self.inputs = {name: column for name, column in described.items() if not column.is_list}
        self.lists = [name for name, column in described.items() if column.is_list]
        self._stored = {name: own_input(view, name) if view else name for name in described}
        widths = [dtype.itemsize * length for dtype, length in self.codes.values()]
        widths += [_input_bytes(column) for column in self.inputs.values()]
        self._ends = np.cumsum(widths).tolist()

    @property
    def width(self) -> int:
        """Bytes of a row."""
        return self._ends[-1]

    def pack(
        self, codes: Mapping[str, torch.Tensor], inputs: Mapping[str, Any], samples: Sequence[int]
    ) -> tuple[np.ndarray, list[str]]:
        """Rows as bytes, uint8 `(B, width)`, and the lists of each as JSON."""
        parts = [codes[name].cpu().contiguous().numpy() for name in self.codes]
        parts += [stored_rows(name, column, inputs[name], samples[0]) for name, column in self.inputs.items()]
        parts = [np.ascontiguousarray(part).view(np.uint8).reshape(len(samples), -1) for part in parts]
        lists = [json.dumps([inputs[name][place] for name in self.lists]) for place in range(len(samples))]
        return np.concatenate(parts, axis=1), lists

    def unpack(self, rows: np.ndarray, lists: Sequence[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Codes and model inputs, by column of the store."""
        parts = iter(np.ascontiguousarray(part) for part in np.split(rows, self._ends[:-1], axis=1))
        codes = {name: torch.from_numpy(next(parts)).view(dtype) for name, (dtype, _) in self.codes.items()}
        inputs: dict[str, Any] = {}
        for name, column in self.inputs.items():
            inputs[self._stored[name]] = column.to_tensor(next(parts).view(column.stored_as))
        values = [json.loads(text) for text in lists]
        return codes, inputs | {self._stored[name]: [row[i] for row in values] for i, name in enumerate(self.lists)}


def partial_path(spec: StoreSpec) -> Path:
    """Where the spec's store is written to until it is finished."""
    return spec.path.with_name(spec.path.name + _SUFFIX)


def _rows_of(ran: ViewRun, positions: np.ndarray) -> ViewRun:
    """Some rows of a batch."""
    if len(positions) == _batch_rows(ran):
        return ran
    places = torch.from_numpy(positions)

    def pick(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value[places.to(value.device)]
        return value if value is None else [value[position] for position in positions]

    columns = {name: pick(value) for name, value in ran.columns.items()}
    return replace(ran, columns=columns, features=pick(ran.features), geometry=pick(ran.geometry))


def _batch_rows(ran: ViewRun) -> int | None:
    values = [ran.features, ran.geometry, *ran.columns.values()]
    return next((len(value) for value in values if value is not None), None)


def _checksum(row: memoryview, lists: str) -> int:
    """Never 0, which marks a row that was not written."""
    return zlib.crc32(row, zlib.crc32(lists.encode())) or 1


def _input_bytes(column: InputColumn) -> int:
    return np.dtype(column.stored_as).itemsize * int(np.prod(column.shape, dtype=np.int64))


def _whole_lines(path: Path) -> Iterator[list[Any]]:
    """Lines of a file; the last one may have been cut short with the process that wrote it."""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)
