"""The commands that read or remove stores: `freezecache inspect`, `verify` and `clean`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..augment.sensitivity import SENSITIVITY, Sensitivity
from ..cache.cleaning import Removable, find_stores, remove
from ..cache.manifest import Manifest
from ..cache.names import MANIFEST, note_file
from ..cache.remote import RemoteStores
from ..cache.shares import SHARE
from ..cache.store import FeatureStore, StoreError
from ..cache.urls import check_url, is_url, local_copy
from ..config import CACHE_FOLDER
from ..model.layout import FeatureLayout
from ..units import format_table, show_bytes
from .plots import plot_sensitivity

_SENSITIVITY_FILE = note_file(SENSITIVITY)


def inspect(directory: str | os.PathLike, picture: str | os.PathLike | None, as_json: bool = False) -> None:
    """Prints what a store holds; draws the sensitivity of its channels if a file for the picture is given.

    Args:
        directory: of the store.
        picture: file of the picture; None: there is none.
        as_json: print the manifest as JSON in place of a table.

    Raises:
        StoreError: if the store is missing or damaged, or nothing was measured that could be drawn.
        ImportError: if a picture is wanted and matplotlib is not installed.
    """
    if is_url(directory):
        if picture is not None:
            raise ValueError("--sensitivity draws stores on a disk: give the folder of the local copy.")
        remote, name = _remote(str(directory))
        manifest, size = remote.manifest(name)
        print(json.dumps({"path": str(directory), **asdict(manifest)}) if as_json else show(directory, manifest, size))
        return
    store = FeatureStore.open(directory)
    print(json.dumps({"path": str(store.path), **asdict(store.manifest)}) if as_json else describe(store))
    if picture is not None:
        draw_sensitivity(store, picture)


def verify(directory: str | os.PathLike, as_json: bool = False) -> None:
    """Reads a whole store, compares every checksum and prints that the store is undamaged.

    Raises:
        StoreError: if it is missing or damaged.
    """
    if is_url(directory):
        remote, name = _remote(str(directory))
        remote.verify(name)
        path = str(directory)
    else:
        store = FeatureStore.open(directory)
        store.verify()
        path = str(store.path)
    print(json.dumps({"path": path, "ok": True}) if as_json else f"{path}: ok")


def _remote(url: str) -> tuple[RemoteStores, str]:
    """The remote place of a store, and the store's name there."""
    place, _, name = url.rstrip("/").rpartition("/")
    check_url(place)
    return RemoteStores(place), name


def clean(directory: str | os.PathLike, yes: bool, as_json: bool = False) -> None:
    """Lists the stores in a directory and the leftovers of builds, and removes them if `yes`.

    Args:
        directory: of the stores; or the output folder of a training, whose own stores are found as well.
        yes: whether to remove them.
        as_json: print JSON in place of a table.

    Raises:
        OSError: if it is no directory, or something cannot be removed.
        ValueError: if it is a remote place.
    """
    if is_url(directory):
        raise ValueError(
            f"{directory}: other machines may read there, and nobody can tell, so nothing is removed from remote "
            "places. Remove the folders of stores with the tools of the place, each manifest.json first. The local "
            f"copies are removed with: freezecache clean {local_copy(str(directory))}"
        )
    stores = find_stores(Path(directory))
    inside = Path(directory) / CACHE_FOLDER
    if inside.is_dir():
        stores += find_stores(inside)
    if as_json:
        found = [{"path": str(store.path), "bytes": store.bytes, "state": _state(store)} for store in stores]
        print(json.dumps({"found": found, "removed_bytes": remove(stores) if yes else 0}))
        return
    if not stores:
        print(f"{directory}: no stores, and none in a folder {CACHE_FOLDER} of it")
        return
    print(format_table([(show_bytes(store.bytes), _state(store), str(store.path)) for store in stores], left=[1, 2]))
    if yes:
        print(f"removed {show_bytes(remove(stores))}")
    else:
        removable = sum(store.bytes for store in stores if not store.running)
        print(f"{show_bytes(removable)} can be removed; nothing was removed: add --yes to do so")


def _state(store: Removable) -> str:
    if store.finished:
        return f"in use by {store.used_by}, stays" if store.running else "store"
    return "being built, stays" if store.running else "left by a build"


def describe(store: FeatureStore) -> str:
    """Returns what a store holds, as text: the facts of its manifest and its files."""
    return show(store.path, store.manifest, (store.path / MANIFEST).stat().st_size)


def show(place: str | os.PathLike, manifest: Manifest, manifest_bytes: int) -> str:
    """The facts of a manifest and of the files that it names, as text.

    Args:
        place: of the store.
        manifest: of the store.
        manifest_bytes: its size.
    """
    files = [(shard.name, shard.bytes, f"{shard.rows:,} samples") for shard in manifest.shards]
    arrow = sum(shard.bytes for shard in manifest.shards)
    files += [(name, entry["bytes"], "") for name, entry in manifest.files.items()]
    files.append((MANIFEST, manifest_bytes, ""))
    facts = [
        *_facts(place, manifest),
        ("bytes", f"{sum(size for _, size, _ in files):,}"),
        ("bytes a sample", f"{arrow / max(1, manifest.rows):,.0f}, in the Arrow files"),
    ]
    rows = [(name, f"{size:,}", note) for name, size, note in files]
    return f"{format_table(facts, left=[0, 1])}\n\n{format_table(rows, left=[0, 2])}"


def _facts(place: str | os.PathLike, manifest: Manifest) -> list[tuple[str, str]]:
    layout = FeatureLayout.from_json(manifest.layout)
    facts = [
        ("path", os.fspath(place)),
        ("cut", f"{manifest.cut} frozen blocks"),
        ("codec", f"{manifest.codec}, every row packed with zstd" if manifest.lossless else manifest.codec),
        ("feature", f"{_times(layout.shape)}, {str(layout.dtype).removeprefix('torch.')}"),
        ("grid", "none" if layout.grid is None else _times(layout.grid)),
        ("special tokens", str(layout.special_tokens)),
        ("samples", _samples(manifest)),
        ("views", f"{manifest.views} beside the base view"),
    ]
    if manifest.views:
        channels = manifest.sensitive_channels
        count = f"all {layout.channels}" if channels is None else f"{len(channels)} of {layout.channels}"
        facts.append(("geometry", "none: views are stored whole" if manifest.geometry is None else manifest.geometry))
        facts.append(("sensitive channels", count))
    return facts


def _samples(manifest: Manifest) -> str:
    share = manifest.made_from.get(SHARE)
    if not isinstance(share, dict):
        return f"{manifest.rows:,}"
    return f"{manifest.rows:,} of {share.get('of')}, the share of node {share.get('node')}"


def draw_sensitivity(store: FeatureStore, picture: str | os.PathLike) -> None:
    """Draws which channels a store holds for every view, from the measurement before its build.

    Raises:
        StoreError: if nothing was measured.
        ImportError: if matplotlib is not installed.
    """
    manifest = store.manifest
    if _SENSITIVITY_FILE not in manifest.files:
        if not manifest.views:
            reason = "it holds the base view alone"
        elif manifest.geometry is None:
            reason = "its views are stored whole"
        else:
            reason = f"it has no {_SENSITIVITY_FILE}"
        raise StoreError(f"no channel's sensitivity was measured for {store.path}: {reason}.")
    try:
        sensitivity = Sensitivity.from_tensors(store.read_note(SENSITIVITY) or {})
    except KeyError as error:
        raise StoreError(f"{store.path / _SENSITIVITY_FILE} lacks {error}: build the store again.") from error
    channels = torch.tensor(manifest.sensitive_channels, dtype=torch.int64)
    plot_sensitivity(sensitivity, channels, picture, f"How the channels at cut {manifest.cut} follow the augmentation")
    print(f"\npicture: {picture}")


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
