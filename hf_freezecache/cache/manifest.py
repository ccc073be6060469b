"""The manifest of a store: its contents, the inputs of its fingerprint, checksums of every file and of itself."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..augment.geometry import GEOMETRY_KINDS
from ..model.layout import FeatureLayout
from .codec import check_codec_name
from .fingerprint import digest
from .names import (
    CHECKSUM,
    CODEC_FILE,
    DATASET_INFO_FILE,
    DATASET_STATE_FILE,
    INPUTS,
    MANIFEST,
    PADDING,
    SIZES,
    TOKENS,
    WIDEST,
    is_reserved,
    shard_name,
)
from .rows import LIST_KINDS, TENSOR_KINDS, InputColumn
from .small_files import LARGEST_JSON

FORMAT_VERSION = 2

#: What a damaged store is answered with.
REBUILD = "delete the store, it is built again"


class StoreError(RuntimeError):
    """A store is missing, damaged, edited or of another version; the message names the file and the remedy."""


@dataclass(frozen=True)
class Shard:
    """One Arrow file of a store.

    Args:
        name: file name.
        rows: number of rows.
        bytes: size of the file.
        sha256: hexadecimal digest of the file.
    """

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Contents and origin of a store.

    Args:
        format_version: version of this format.
        fingerprint: digest of `made_from`.
        made_from: the inputs of the fingerprint, see `fingerprint_inputs`.
        cut: number of frozen blocks.
        codec: name of the codec.
        layout: shape, grid, special tokens and dtype of a feature, see `FeatureLayout.to_json`.
        rows: number of samples; row i is sample i.
        views: number of augmented views beside the base view.
        geometry: kind of the views' geometry; None if views are stored whole, or there are none.
        sensitive_channels: the channels that are stored for every view; None if all are.
        own_inputs: whether each view has model inputs for itself, e.g. labels drawn by a collator.
        inputs: columns of the model inputs that are stored per row.
        constants: model inputs that are the same for every batch.
        shards: the Arrow files, in the order of their rows.
        files: size and sha256 of every other file.
        lossless: whether each row's codes are compressed to a zstd frame.
    """

    format_version: int
    fingerprint: str
    made_from: dict[str, Any]
    cut: int
    codec: str
    layout: dict[str, Any]
    rows: int
    views: int
    geometry: str | None
    sensitive_channels: list[int] | None
    own_inputs: bool
    inputs: dict[str, InputColumn]
    constants: dict[str, Any]
    shards: list[Shard]
    files: dict[str, dict[str, Any]]
    lossless: bool = False

    def to_json(self) -> str:
        """The manifest as JSON text; its last field is the checksum of all others.

        Raises:
            StoreError: if it is too long to be read again.
        """
        content = asdict(self)
        content["checksum"] = _content_checksum(content)
        text = json.dumps(content, indent=2)
        if len(text) > LARGEST_JSON:
            raise StoreError(
                f"the manifest would have {len(text):,} bytes, of which {LARGEST_JSON:,} can be read again."
            )
        return text

    @classmethod
    def from_json(cls, text: bytes, path: Path | str) -> Manifest:
        """Reads a manifest.

        Args:
            text: content of the file.
            path: or URL of the file, for error messages.

        Raises:
            StoreError: if it is not JSON, of another version, or its checksum does not match.
        """
        with translated(f"{path} is not a manifest"):
            content = json.loads(text.decode("utf-8"))
            version, checksum = content["format_version"], content.pop("checksum")
            if version != FORMAT_VERSION:
                raise StoreError(
                    f"{path} has format version {version!r}; this release reads version {FORMAT_VERSION}. Delete the "
                    "store, it is built again, or use the release that wrote it."
                )
            if _content_checksum(content) != checksum:
                raise StoreError(f"{path} does not match its own checksum: it was edited or damaged: {REBUILD}.")
            return cls._from_content(content, path)

    @classmethod
    def _from_content(cls, content: dict[str, Any], path: Path | str) -> Manifest:
        names = {field.name for field in fields(cls)}
        if not names - {"lossless"} <= content.keys() <= names:
            raise StoreError(f"{path} has other fields than a manifest: {REBUILD}.")
        for name, is_valid in _FIELDS.items():
            if name in content and not is_valid(content[name]):
                raise StoreError(f"{path}: {name!r} is not what a manifest holds there: {REBUILD}.")
        content["inputs"] = {
            name: InputColumn(value["dtype"], tuple(value["shape"]), value["is_list"])
            for name, value in content["inputs"].items()
        }
        content["shards"] = [Shard(**shard) for shard in content["shards"]]
        return cls(**content)

    def check(self, begun: bool = False) -> None:
        """Checks that the fields fit each other, before anything is read or reserved because of them.

        Args:
            begun: whether the store was only begun, and has no shards yet.

        Raises:
            StoreError: if they do not; the message says which.
        """
        problem = self._problem(begun)
        if problem is not None:
            raise StoreError(f"the manifest contradicts itself, because {problem}: {REBUILD}.")

    @property
    def _are_texts(self) -> bool:
        number = InputColumn("int64")
        constants = self.constants.keys() == {PADDING, INPUTS} and all(map(_is_text, self.constants.values()))
        return not self.views and constants and self.inputs == {TOKENS: number, CHECKSUM: number}

    @property
    def _have_sizes(self) -> bool:
        number = InputColumn("int64")
        constants = self.constants.keys() == {SIZES} and isinstance(self.constants[SIZES], str)
        return not self.views and constants and self.inputs == {TOKENS: number, CHECKSUM: number}

    @property
    def _are_trimmed(self) -> bool:
        constants = self.constants.keys() == {WIDEST} and isinstance(self.constants[WIDEST], str)
        return not self.views and constants and self.inputs == {CHECKSUM: InputColumn("int64")}

    def _problem(self, begun: bool) -> str | None:
        if digest(self.made_from) != self.fingerprint:
            return "its fingerprint is not that of `made_from`"
        for name in ("format_version", "cut", "codec", "rows"):
            if self.made_from.get(name, getattr(self, name)) != getattr(self, name):
                return f"`{name}` is another one in `made_from`"
        if not {CODEC_FILE, DATASET_INFO_FILE, DATASET_STATE_FILE} <= self.files.keys():
            return "files are missing in `files`"
        layout = FeatureLayout.from_json(self.layout)
        most = _MOST_BESIDE + 128 * layout.channels**2 + 64 * self.rows  # maps between channels; a row's files
        for name, entry in self.files.items():
            if entry["bytes"] > (LARGEST_JSON if name.endswith(".json") else most):
                return f"{name!r} has {entry['bytes']:,} bytes, which it cannot have beside such shards"
        channels = self.sensitive_channels
        if (self.geometry is None) != (channels is None) or ((self.geometry or self.own_inputs) and not self.views):
            return "geometry, sensitive channels, inputs and number of views do not go together"
        if channels is not None and channels != sorted({*channels} & {*range(layout.channels)}):
            return f"the sensitive channels are not channels from 0 to {layout.channels - 1} in ascending order"
        if begun:
            return "a store that was begun has shards" if self.shards else None
        if not self.shards or [shard.name for shard in self.shards] != [
            shard_name(index, len(self.shards)) for index in range(len(self.shards))
        ]:
            return "`shards` is not the list of its Arrow files"
        if sum(shard.rows for shard in self.shards) != self.rows:
            return f"its shards do not have {self.rows} rows"
        # A value of a row takes a bit at least, a view a byte; zstd packs at most so much better.
        bits = 8 * sum(shard.bytes for shard in self.shards) * (BEST_PACKED if self.lossless else 1)
        if layout.is_token and not self._are_texts and not self._have_sizes:
            return "it holds texts, or samples of several sizes, but not what is held of such"
        if layout.is_trimmed and not self._are_trimmed:
            return "its rows are trimmed, but it does not hold what is held of such rows"
        if self.rows * max(1 if layout.is_token else layout.values, 8 * self.views) > bits:
            return f"its shards are too small for {self.rows} rows of shape {layout.shape} and {self.views} views"
        return None


#: No input is packed by zstd to a smaller share than this.
BEST_PACKED = 2**16
#: Most bytes of a file beside the shards that do not depend on channels or rows: of a few pictures of features.
_MOST_BESIDE = 2**28
#: Most bytes of a file, rows, or values that anything on a disk may have.
_MOST = 2**60


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value <= _MOST


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) <= 1000


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_shape(value: Any, least: int = 1) -> bool:
    return isinstance(value, list) and all(_is_count(size, least) for size in value) and math.prod(value) <= _MOST


def _is_codec(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        check_codec_name(value)
    except ValueError:
        return False
    return True


def _is_layout(value: Any) -> bool:
    flags = {"is_token", "is_trimmed"}
    if not isinstance(value, dict) or value.keys() - flags != {"shape", "grid", "special_tokens", "dtype"}:
        return False
    if any(value.get(flag, True) is not True for flag in flags):  # written where they are
        return False
    grid = value["grid"]
    if not (grid is None or (_is_shape(grid) and len(grid) == 2)) or not _is_shape(value["shape"]):
        return False
    if not _is_count(value["special_tokens"]) or not isinstance(value["dtype"], str):
        return False
    try:
        FeatureLayout.from_json(value)
    except ValueError:
        return False
    return True


def _is_inputs(value: Any) -> bool:
    return isinstance(value, dict) and all(not is_reserved(name) and _is_input(entry) for name, entry in value.items())


def _is_input(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "is_list"}:
        return False
    dtype, shape, is_list = value["dtype"], value["shape"], value["is_list"]
    if type(is_list) is not bool or not isinstance(dtype, str) or not _is_shape(shape, least=0):
        return False
    return not shape and dtype in LIST_KINDS if is_list else dtype in TENSOR_KINDS


def _is_constants(value: Any) -> bool:
    return isinstance(value, dict) and all(
        not is_reserved(name) and (entry is None or isinstance(entry, (bool, int, float, str)))
        for name, entry in value.items()
    )


def _is_shards(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(shard, dict)
        and shard.keys() == {"name", "rows", "bytes", "sha256"}
        and _is_text(shard["name"])
        and _is_count(shard["rows"])
        and _is_count(shard["bytes"], least=1)
        and _is_sha256(shard["sha256"])
        for shard in value
    )


def _is_files(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_file_name(name)
        and isinstance(entry, dict)
        and entry.keys() == {"bytes", "sha256"}
        and _is_count(entry["bytes"])
        and _is_sha256(entry["sha256"])
        for name, entry in value.items()
    )


def _is_file_name(name: str) -> bool:
    """A file beside the shards: nothing that leads out of the directory."""
    return re.fullmatch(r"\w[\w.-]*", name, re.ASCII) is not None and name != MANIFEST and len(name) <= 200


def _is_channels(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(_is_count(channel) for channel in value))


#: Field of a manifest -> whether a JSON value may be its own.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "fingerprint": _is_text,
    "made_from": lambda value: isinstance(value, dict),
    "cut": _is_count,
    "codec": _is_codec,
    "layout": _is_layout,
    "rows": lambda value: _is_count(value, least=1),
    "views": _is_count,
    "geometry": lambda value: value is None or (isinstance(value, str) and value in GEOMETRY_KINDS),
    "sensitive_channels": _is_channels,
    "own_inputs": lambda value: type(value) is bool,
    "inputs": _is_inputs,
    "constants": _is_constants,
    "shards": _is_shards,
    "files": _is_files,
    "lossless": lambda value: type(value) is bool,
}


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """The boundary to files that anybody may have written: whatever they make a parser raise is a `StoreError`.

    Errors of the operating system, and too little memory, say nothing of the files and stay what they are.

    Args:
        what: the file and its fault, as the beginning of a sentence.

    Raises:
        StoreError: in place of any other error.
    """
    try:
        yield
    except (StoreError, MemoryError):
        raise
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise StoreError(f"{what} ({error}): {REBUILD}.") from error
    except Exception as error:
        # pyarrow's errors of damaged files are errors of the operating system, too, but without a number.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise StoreError(f"{what} ({type(error).__name__}: {error}): {REBUILD}.") from error


def _content_checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
