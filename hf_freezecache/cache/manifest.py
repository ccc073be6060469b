"""What a store says of itself: the manifest, which vouches for every file and for itself."""

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
    """A store is missing, damaged, of another version or edited; the message says which file and what to do."""


@dataclass(frozen=True)
class Shard:
    """One Arrow file of a store."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a store holds and what it was made from.

    Args:
        format_version: version of this format.
        fingerprint: digest of `made_from`.
        made_from: what the fingerprint covers.
        cut: frozen blocks.
        codec: name of the codec.
        layout: the feature's shape, grid, special tokens and dtype.
        rows: number of samples; row i is sample i.
        views: augmented views beside the base view.
        geometry: kind of their geometry; None if they are kept whole, or there are none.
        sensitive_channels: the channels that are kept of them; None if all are.
        own_inputs: whether a view has model inputs of its own.
        inputs: model inputs that are kept per row.
        constants: model inputs that are the same for every batch.
        shards: the Arrow files, in the order of their rows.
        files: size and sha256 of every other file.
        lossless: whether every row's codes are a zstd frame.
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
        """The manifest as text; its last field is the checksum of all others."""
        content = asdict(self)
        content["checksum"] = _checksum(content)
        return json.dumps(content, indent=2)

    @classmethod
    def from_json(cls, text: bytes, path: Path) -> Manifest:
        """Reads a manifest.

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
        if _checksum(content) != checksum:
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


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
