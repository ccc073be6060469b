"""A digest of any Python value by its structure: what it holds, and the code of its classes and functions.

Nothing is pickled, so that what pickle cannot read or reads wastefully (a view of a large tensor) counts as it is, and
so does code that has no file. What differs between two runs of one program does not count: addresses, the order of a
set, states of random generators, locks, where a file lies.
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import io
import json
import logging
import os
import random
import re
import threading
import weakref
from collections.abc import Callable, Collection, Iterable
from enum import Enum
from pathlib import Path, PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
import xxhash
from torch import nn

from .code_digest import class_parts, code_parts, function_parts
from .installed import describe_origin, is_installed
from .table_origins import ranges_of

#: The most bytes of one table, array or file that are read; larger ones count by the size and time of their files.
LARGEST_READ = 1 << 32
_PLAIN = (type(None), bool, int, float, complex, str, bytes)
#: Entries from which on a container of plain values is digested as one text.
_LARGE = 64
#: States of these change whenever something is drawn. What is drawn is seen in the rows.
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator, torch.Generator)
_WITHOUT_STATE = (
    type(threading.Lock()),
    type(threading.RLock()),
    threading.local,
    logging.Logger,
    weakref.ref,
    *_GENERATORS,
)
_DESCRIPTORS = (staticmethod, classmethod, property, functools.cached_property, functools.partialmethod)
_WRAPPERS = (type(str.lower), type(object.__init__), type(object().__str__), type(dict.__dict__["fromkeys"]))
_MAYBE_PATH = re.compile(r"[^\n\0]{1,1024}")


class Undigestible(TypeError):
    """Nothing tells whether two values of this kind are the same; the message names the kind."""


class ValueDigest:
    """Computes digests of values; what several values share is digested once.

    Args:
        known_files: paths of files that are compared elsewhere: their places do not count, nor do their contents.
        unknown: stands for a value that cannot be digested; None: such a value is an error.
        on_unknown: is told of each such value.
    """

    def __init__(
        self,
        known_files: Collection[str] = (),
        unknown: str | None = None,
        on_unknown: Callable[[Undigestible], None] = lambda error: None,
    ):
        self.known_files, self.unknown, self.on_unknown = known_files, unknown, on_unknown
        # The values are kept: the address of one that is gone may be another's.
        self._finished: dict[int, tuple[Any, bytes]] = {}
        self._running: dict[int, int] = {}

    def hex(self, value: Any) -> str:
        """The digest of a value: 64 hexadecimal digits.

        Raises:
            Undigestible: if it holds something that cannot be digested, where nothing stands for that.
        """
        return self(value).hex()

    def __call__(self, value: Any) -> bytes:
        if type(value) in _PLAIN:
            return _join(b"plain", [self._plain(value)])
        key = id(value)
        if key in self._finished:
            return self._finished[key][1]
        if key in self._running:  # a cycle: how far up it leads
            return _join(b"cycle", [str(len(self._running) - self._running[key]).encode()])
        self._running[key] = len(self._running)
        try:
            digest = self._structure(value)
        except (Undigestible, RecursionError) as error:
            if self.unknown is None:
                raise
            problem = error if isinstance(error, Undigestible) else Undigestible("values nested too deeply")
            self.on_unknown(problem)
            digest = _join(b"unknown", [self.unknown.encode()])
        finally:
            del self._running[key]
        self._finished[key] = (value, digest)
        return digest

    def name(self, value: Any, name: str) -> None:
        """From now on a value counts by this name, wherever it is referred to."""
        self._finished[id(value)] = value, _join(b"named", [name.encode()])

    def parts(self, kind: str, parts: Iterable[Any]) -> bytes:
        """The digest of several values in their order."""
        return _join(kind.encode(), (self(part) for part in parts))

    # Kinds of values

    def _plain(self, value: Any) -> bytes:
        if type(value) is str and _MAYBE_PATH.fullmatch(value) and (os.sep in value or "." in value):
            return self._path(value)
        return b"bytes" + value if type(value) is bytes else repr(value).encode("utf-8", "surrogatepass")

    def _path(self, text: str) -> bytes:
        """A file counts by its content and a folder by being one, wherever they lie; any other text as it is."""
        if text in self.known_files:
            return b"file of a row"
        if os.path.isabs(text) and os.path.isdir(text):
            return b"folder"
        return file_digest(text) if os.path.isfile(text) else repr(text).encode("utf-8", "surrogatepass")

    def _structure(self, value: Any) -> bytes:
        kind = type(value)
        if kind in (list, tuple, dict) and len(value) >= _LARGE:
            text = _as_text(value)
            if text is not None:
                return _join(kind.__name__.encode(), [_bulk(text)])
        if kind in (list, tuple):
            return self.parts(kind.__name__, value)
        if kind in (dict, MappingProxyType):  # dataclasses hold such a view of a dict
            return self.parts("dict", (part for item in value.items() for part in item))
        if kind in (set, frozenset):
            return _join(b"set", sorted(self(part) for part in value))
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, np.ndarray | np.generic):
            return self._array(np.asarray(value))
        if isinstance(value, datasets.Dataset):
            return self._dataset(value)
        if isinstance(value, pa.Table):
            return _join(b"table", [table_digest(value)])
        if isinstance(value, PurePath):
            return _join(b"path", [self._path(str(value))])
        if isinstance(value, ModuleType):
            return self._module(value)
        return self._code(value) or self._object(value)

    def _code(self, value: Any) -> bytes | None:
        """Functions, methods, classes and what wraps them; None for anything else."""
        if isinstance(value, FunctionType):
            return self.parts("function", function_parts(value))
        if isinstance(value, MethodType):
            return self.parts("method", (value.__func__, value.__self__))
        if isinstance(value, type):
            return self.parts("class", class_parts(value, self))
        if isinstance(value, CodeType):
            return self.parts("code", code_parts(value))
        if isinstance(value, functools.partial):
            return self.parts("partial", (type(value), value.func, value.args, value.keywords, vars(value)))
        if isinstance(value, _DESCRIPTORS):
            names = ("__func__", "fget", "fset", "func", "args", "keywords")
            return self.parts(type(value).__name__, (getattr(value, name, None) for name in names))
        if isinstance(value, BuiltinFunctionType):
            owner = value.__self__ if not isinstance(value.__self__, ModuleType) else value.__self__.__name__
            return self.parts("builtin", (value.__qualname__, describe_origin(value.__module__), owner))
        if isinstance(value, _WRAPPERS):
            return self.parts("builtin", (value.__qualname__, getattr(value, "__objclass__", None)))
        if hasattr(value, "__wrapped__") and callable(value):  # `functools.lru_cache` and the like
            return self.parts("wrapper", (type(value).__qualname__, value.__wrapped__))
        return None

    def _object(self, value: Any) -> bytes:
        kind = type(value)
        if isinstance(value, _WITHOUT_STATE):
            return self.parts("stateless", (kind.__qualname__,))
        if isinstance(value, Enum):
            return self.parts("enum", (kind, value.name))
        if isinstance(value, io.IOBase):
            raise Undigestible(f"an open file ({kind.__name__})")
        own = any(name in vars(base) for base in kind.__mro__[:-1] for name in ("__reduce__", "__reduce_ex__"))
        plain = not own and "__getstate__" not in {name for base in kind.__mro__[:-1] for name in vars(base)}
        if isinstance(value, nn.Module) or (plain and hasattr(value, "__dict__")):
            return self.parts("object", (kind, *self._state(value), *self._items(value)))
        try:
            reducer = copyreg.dispatch_table.get(kind)
            reduced = value.__reduce_ex__(4) if reducer is None else reducer(value)
        except Exception as error:  # the object's own code, which may raise anything
            raise Undigestible(f"{kind.__qualname__} ({type(error).__name__}: {error})") from error
        if isinstance(reduced, str):
            return self.parts("global", (kind, reduced))
        function, arguments, *rest = reduced
        rest = [list(part) if number in (1, 2) and part is not None else part for number, part in enumerate(rest)]
        return self.parts("reduced", (kind, function, arguments, *rest))

    def _state(self, value: Any) -> list[Any]:
        state = {name: vars(value)[name] for name in sorted(vars(value))}
        for base in type(value).__mro__:
            slots = vars(base).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                    state[name] = getattr(value, name)
        return [state]

    @staticmethod
    def _items(value: Any) -> list[Any]:
        """What an object of a class made from a container holds."""
        if isinstance(value, dict):
            return [dict(value)]
        if isinstance(value, list | tuple):
            return [list(value)]
        if isinstance(value, set | frozenset):
            return [set(value)]
        if isinstance(value, str):
            return [str(value)]
        return [repr(value)] if isinstance(value, bytes | int | float) else []

    def _module(self, module: ModuleType) -> bytes:
        file = getattr(module, "__file__", None)
        if is_installed(module.__name__) or file is None:
            return self.parts("module", (module.__name__, describe_origin(module.__name__)))
        return _join(b"module", [file_digest(file)])

    def _tensor(self, value: torch.Tensor) -> bytes:
        value = value.detach()
        flatten = getattr(value, "__tensor_flatten__", None)
        if flatten is not None and type(value) not in (torch.Tensor, nn.Parameter):
            names, settings = flatten()
            return self.parts("tensor", (type(value), settings, *(getattr(value, name) for name in names)))
        if value.is_quantized:
            scheme = [value.q_scale(), value.q_zero_point()] if value.qscheme() == torch.per_tensor_affine else None
            if scheme is None:
                names = ("q_per_channel_scales", "q_per_channel_zero_points", "q_per_channel_axis")
                scheme = [getattr(value, name)() for name in names]
            return self.parts("quantized", (str(value.dtype), value.int_repr(), scheme))
        if value.layout != torch.strided:
            dense = value.coalesce() if value.layout == torch.sparse_coo else value
            return self.parts("sparse", (str(value.layout), tuple(value.shape), dense.to_dense()))
        if value.is_meta:
            raise Undigestible("a tensor without data (device meta)")
        extras = {name: part for name, part in vars(value).items() if not name.startswith("_")}
        try:
            memory = tensor_memory(value)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise Undigestible(
                f"a tensor of the class {type(value).__qualname__} ({type(error).__name__}: {error})"
            ) from error
        described = f"{tuple(value.shape)}|{value.dtype}".encode()
        return _join(b"tensor", [described, _bulk(memory), self(extras) if extras else b""])

    def _array(self, value: np.ndarray) -> bytes:
        described = f"{value.shape}|{value.dtype.str}|{value.dtype.fields}".encode()
        if value.dtype.hasobject:
            return _join(b"array", [described, self(value.tolist())])
        if isinstance(value, np.memmap) and value.nbytes > LARGEST_READ and value.filename is not None:
            return _join(b"array", [described, str(value.offset).encode(), file_digest(str(value.filename))])
        contiguous = np.ascontiguousarray(value)
        return _join(b"array", [described, _bulk(contiguous.reshape(-1).view(np.uint8).data if value.size else b"")])

    def _dataset(self, value: datasets.Dataset) -> bytes:
        """Rows and format of a data set; a column of images or sounds without the places of their files."""
        media = [
            name for name, feature in value.features.items() if isinstance(feature, datasets.Image | datasets.Audio)
        ]
        table, files = value.data.table, [entry["filename"] for entry in value.cache_files]
        if table.nbytes > LARGEST_READ and files:
            content = b"".join(file_digest(file, whole=False) for file in files) + self(ranges_of(value.data))
        else:
            parts = [table_digest(table.drop_columns(media))]
            parts += [self._media(table.column(name)) for name in media]
            content = b"".join(parts)
        indices = b"" if value._indices is None else table_digest(value._indices.table)
        form = value.format
        versions = describe_origin("PIL") if media else ""
        columns = sorted(form["columns"])  # rows have them in the order of the table
        shape = (repr(value.features), form["type"], columns, form["output_all_columns"], versions)
        return _join(b"dataset", [content, indices, self(shape), self(dict(form["format_kwargs"]))])

    def _media(self, column: pa.ChunkedArray) -> bytes:
        paths: list[str | None] = []
        content = []
        for chunk in column.chunks:
            if not pa.types.is_struct(chunk.type):
                content.append(table_digest(pa.table({"value": chunk})))
                continue
            held = chunk.field("bytes")
            content.append(table_digest(pa.table({"bytes": held})))
            absent = held.is_null().to_pylist()
            paths += [
                path for path, is_absent in zip(chunk.field("path").to_pylist(), absent, strict=True) if is_absent
            ]
        return _join(b"media", [*content, self(paths)])


def _as_text(value: Any) -> bytes | None:
    """A container as text, much faster than entry by entry; None if it may hold paths or is not plain."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return None
    return None if os.sep in text else text.encode("utf-8", "surrogatepass")


def table_digest(table: pa.Table) -> bytes:
    """Digest of the columns of a table, chunk by chunk."""
    total = xxhash.xxh3_128()
    total.update(str(table.schema.remove_metadata()).encode())
    for name in table.column_names:
        sink = _Sink(total)
        column = table.select([name]).replace_schema_metadata(None)
        with pa.PythonFile(sink, mode="w") as file, pa.ipc.new_stream(file, column.schema) as writer:
            writer.write_table(column)
    return total.digest()


class _Sink(io.RawIOBase):
    """Passes what is written to a checksum."""

    def __init__(self, total: Any):
        self._total = total

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self._total.update(content)
        return len(content)


def file_digest(path: str | Path, whole: bool = True) -> bytes:
    """Digest of a file: by its content, or by its size and time where it is large or `whole` is false.

    Raises:
        Undigestible: if the file cannot be read.
    """
    try:
        status = os.stat(path)
        if not whole or status.st_size > LARGEST_READ:
            return f"file|{status.st_size}|{status.st_mtime_ns}".encode()
        total = xxhash.xxh3_128()
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                total.update(block)
        return b"file|" + total.digest()
    except OSError as error:
        raise Undigestible(f"a file that cannot be read ({error})") from error


def tensor_memory(value: torch.Tensor) -> memoryview:
    """The bytes of a tensor in the order of its values; without a copy where it is contiguous and on the CPU."""
    value = value.detach().cpu().contiguous().resolve_conj().resolve_neg()
    if not value.numel():
        return memoryview(b"")
    # `Tensor.numpy` would fix the size of the memory, which FSDP2 frees by making it smaller.
    return np.from_dlpack(value.reshape(-1).view(torch.uint8)).data


def _bulk(content: Any) -> bytes:
    return xxhash.xxh3_128(content).digest()


def _join(kind: bytes, parts: Iterable[bytes]) -> bytes:
    total = hashlib.sha256(kind)
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.digest()
