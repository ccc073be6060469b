"""The manifest of a store: its contents, the inputs of its fingerprint, checksums of every file and of itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .rows import InputColumn

FORMAT_VERSION = 2


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
        """The manifest as JSON text; its last field is the checksum of all others."""
        content = asdict(self)
        content["checksum"] = _content_checksum(content)
        return json.dumps(content, indent=2)

    @classmethod
    def from_json(cls, text: bytes, path: Path) -> Manifest:
        """Reads a manifest.

        Args:
            text: content of the file.
            path: of the file, for error messages.

        Raises:
            StoreError: if it is not JSON, of another version, or its checksum does not match.
        """
        try:
            content = json.loads(text.decode("utf-8"))
            version, checksum = content["format_version"], content.pop("checksum")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise StoreError(f"{path} is not a manifest ({error!r}): delete the store, it is built again.") from error
        if version != FORMAT_VERSION:
            raise StoreError(
                f"{path} has format version {version}; this release reads version {FORMAT_VERSION}. Delete the store, "
                "it is built again, or use the release that wrote it."
            )
        if _content_checksum(content) != checksum:
            raise StoreError(
                f"{path} does not match its own checksum: it was edited or damaged. Delete the store, "
                "it is built again."
            )
        content["inputs"] = {
            name: InputColumn(value["dtype"], tuple(value["shape"]), value["is_list"])
            for name, value in content["inputs"].items()
        }
        content["shards"] = [Shard(**shard) for shard in content["shards"]]
        return cls(**content)


def _content_checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
