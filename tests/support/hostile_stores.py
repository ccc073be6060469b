"""Stores that somebody has edited, with checksums that fit."""

import hashlib
import json

from hf_freezecache.cache import manifest as manifest_module

from .builds import Rows, collate


class NamedRows(Rows):
    """Rows with a string, so that manifests have every kind of column."""

    def __getitem__(self, row):
        return {**super().__getitem__(row), "name": f"row {row}"}


def with_constant(samples):
    return {**collate(samples), "return_loss": True, "scale": 0.5}


def write_manifest(path, content):
    """A manifest with the right checksum, whatever is in it."""
    content.pop("checksum", None)
    content["checksum"] = manifest_module._content_checksum(content)
    (path / "manifest.json").write_text(json.dumps(content))


def read_manifest(path):
    return json.loads((path / "manifest.json").read_text())


def with_checksum(path, name):
    """Makes the manifest fit a file that was changed: its bytes, not its checksum, must be what is refused."""
    content, file = read_manifest(path), path / name
    entries = {**content["files"], **{shard["name"]: shard for shard in content["shards"]}}
    entries[name] |= {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    write_manifest(path, content)
