"""Whole stores in an object store, so that a team builds each once; trainings read local copies of them.

A remote place holds, for every store:

| name | what it is |
|---|---|
| `<fingerprint>/manifest.json` | the manifest, written last: without it there is no store |
| `<fingerprint>/<digits>/<file>` | the other files; the digits are those of the manifest's own sha256 |

Whoever builds a store at the same time writes to another folder, unless all bytes are the same, so that a manifest and
its files always belong together. What comes from there is checked as any store is, whoever has written it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from transformers.utils import logging

from ..distributed import Announcer, Group
from ..units import show_bytes
from .directories import claim_aside, discard_aside, rename_aside, sync_directory
from .holdings import disk_limit
from .manifest import Manifest, StoreError, translated
from .names import MANIFEST, is_fingerprint

logger = logging.get_logger(__name__)

T = TypeVar("T")

#: A remote manifest with more bytes, or files beside the shards, is none.
_LARGEST_MANIFEST, _MOST_FILES = 1 << 26, 64
_BLOCK = 1 << 22
#: Seconds and tries after which an object store counts as unreachable, unless fsspec is configured otherwise.
_PATIENCE = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 2}}


class RemoteStores:
    """The stores of a remote place. Nothing that happens there costs a training: it is logged, and stores are built.

    Args:
        url: of the place, as fsspec writes it; `check_url` has nothing against it.

    Attributes:
        limit: the most bytes that a store of a cut, in a directory, may take; None: whatever the disk holds.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.limit: Callable[[int, Path], int | None] = lambda cut, path: None
        self._announcer = Announcer(Group(), logger)
        self._opened: tuple[Any, str] | None = None
        self._is_off = False
        # Stores there that are damaged, or others than their names say.
        self._refused: set[str] = set()

    # In trainings: nothing is raised

    def has_stores(self) -> bool:
        """Whether there may be any."""
        return bool(self._try("cannot be listed", self._list))

    def fetch(self, path: Path) -> None:
        """Makes the local copy of a store, if there is none, and there is such a store.

        Args:
            path: the directory of the copy; its name is that of the store.
        """
        if not path.exists() and path.name not in self._refused:
            self._try("cannot be read", partial(self._fetch, path))

    def upload(self, path: Path) -> None:
        """Uploads a store, unless it is there.

        Args:
            path: its directory.
        """
        self._try("cannot be written", partial(self._upload, path))

    def _try(self, what: str, step: Callable[[], T]) -> T | None:
        """Runs a step; after the first failure there is no remote place any more."""
        if self._is_off:
            return None
        try:
            return step()
        except Exception as error:  # each kind of remote place has errors of its own
            self._is_off = True
            self._announcer.failure(
                f"{self.url} {what}: this training goes on with local feature stores, and uploads no more", error
            )
            return None

    def _list(self) -> bool:
        files, root = self._open()
        try:
            return bool(files.ls(root, detail=False))
        except FileNotFoundError:
            return False

    def _fetch(self, path: Path) -> None:
        try:
            text = self._read_manifest(path.name)
            if text is not None:
                self._download(path, text)
        except StoreError as error:
            self._refused.add(path.name)
            self._announcer.warning(f"The feature store {self._place(path.name)} is not used: {error}")

    def _upload(self, path: Path) -> None:
        name, text = path.name, (path / MANIFEST).read_bytes()
        if name not in self._refused and self._read_manifest(name) is not None:
            return
        files, root = self._open()
        folder = f"{root}/{name}/{_folder(text)}"
        files.makedirs(folder, exist_ok=True)
        for file in _sizes(self._parse(name, text)):
            files.put_file(str(path / file), f"{folder}/{file}")
        files.pipe_file(f"{root}/{name}/{MANIFEST}", text)
        self._refused.discard(name)
        self._announcer.warning(f"Uploaded the feature store {path} to {self._place(name)}.")

    # For people: what happens is raised

    def manifest(self, name: str) -> tuple[Manifest, int]:
        """The manifest of a store, and its size in bytes.

        Raises:
            StoreError: if there is none, or it is damaged.
            Exception: if the place cannot be read.
        """
        text = self._need_manifest(name)
        return self._parse(name, text), len(text)

    def verify(self, name: str) -> None:
        """Reads a whole store and compares every checksum; nothing is kept.

        Raises:
            StoreError: if there is none, or it is damaged.
            Exception: if the place cannot be read.
        """
        text = self._need_manifest(name)
        for file, (size, sha256) in _sizes(self._parse(name, text)).items():
            for _ in self._blocks(name, text, file, size, sha256):
                pass

    # Helpers

    def _open(self) -> tuple[Any, str]:
        if self._opened is None:
            import fsspec

            protocol = self.url.partition("://")[0].lower()
            patient = protocol in ("s3", "s3a") and "config_kwargs" not in fsspec.config.conf.get(protocol, {})
            options = {"config_kwargs": _PATIENCE} if patient else {}
            files, root = fsspec.core.url_to_fs(self.url, **options)
            self._opened = files, root.rstrip("/")
        self._opened[0].invalidate_cache()  # others write there, too
        return self._opened

    def _place(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _need_manifest(self, name: str) -> bytes:
        text = self._read_manifest(name) if is_fingerprint(name) else None
        if text is None:
            raise StoreError(f"{self._place(name)} is not a feature store: it has no {MANIFEST}.")
        return text

    def _read_manifest(self, name: str) -> bytes | None:
        """The text of a store's manifest; None if there is no such store.

        Raises:
            StoreError: if it is too large.
        """
        files, root = self._open()
        try:
            text = files.cat_file(f"{root}/{name}/{MANIFEST}", start=0, end=_LARGEST_MANIFEST + 1)
        except FileNotFoundError:
            return None
        if len(text) > _LARGEST_MANIFEST:
            raise StoreError(f"{self._place(name)}/{MANIFEST} has more than {show_bytes(_LARGEST_MANIFEST)}.")
        return text

    def _parse(self, name: str, text: bytes) -> Manifest:
        """A manifest of which every name and size was checked.

        Raises:
            StoreError: if it is damaged, or that of another store.
        """
        place = f"{self._place(name)}/{MANIFEST}"
        manifest = Manifest.from_json(text, place)
        with translated(f"{place} is not that of a store"):
            manifest.check()
        if manifest.fingerprint != name:
            raise StoreError(f"{place} is that of another store, {manifest.fingerprint}.")
        if len(manifest.files) > _MOST_FILES:
            raise StoreError(f"{place} names {len(manifest.files)} files, and a store has {_MOST_FILES} at most.")
        return manifest

    def _download(self, path: Path, text: bytes) -> None:
        manifest = self._parse(path.name, text)
        total = len(text) + sum(size for size, _ in _sizes(manifest).values())
        limit = disk_limit(path.parent, self.limit(manifest.cut, path))
        if total > limit:
            raise StoreError(
                f"it has {show_bytes(total)}, but only {show_bytes(max(limit, 0))} of {path.parent}, or of "
                "`cache_budget`, are left."
            )
        aside = claim_aside(path)
        if aside is None:
            return  # another process makes the same store here: it is waited for
        try:
            for file, (size, sha256) in _sizes(manifest).items():
                _write(aside / file, self._blocks(path.name, text, file, size, sha256))
            _write(aside / MANIFEST, iter([text]))
            sync_directory(aside)
            rename_aside(aside, path)
        except BaseException:
            discard_aside(aside)
            raise
        sync_directory(path.parent)
        self._announcer.warning(
            f"Downloaded the feature store {self._place(path.name)} ({show_bytes(total)}) to {path}."
        )

    def _blocks(self, name: str, text: bytes, file: str, size: int, sha256: str) -> Iterator[bytes]:
        """The content of a file, no byte more than its size.

        Raises:
            StoreError: at its end, if it is not the content that the manifest says.
        """
        files, root = self._open()
        digest, left, place = hashlib.sha256(), size, f"{self._place(name)}/{_folder(text)}/{file}"
        try:
            with files.open(f"{root}/{name}/{_folder(text)}/{file}", "rb") as opened:
                while block := opened.read(min(_BLOCK, left + 1)):
                    left -= len(block)
                    if left < 0:
                        break
                    digest.update(block)
                    yield block
        except FileNotFoundError as error:
            raise StoreError(f"{place} is missing.") from error
        if left or digest.hexdigest() != sha256:
            raise StoreError(f"{place} is damaged: it does not match the checksum in its manifest.")


def _folder(text: bytes) -> str:
    """The folder of the files of a manifest."""
    return hashlib.sha256(text).hexdigest()[:32]


def _sizes(manifest: Manifest) -> dict[str, tuple[int, str]]:
    """Size and sha256 of every file but the manifest."""
    shards = {shard.name: (shard.bytes, shard.sha256) for shard in manifest.shards}
    return shards | {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.files.items()}


def _write(path: Path, blocks: Iterator[bytes]) -> None:
    """Writes a file of a local copy and makes it durable.

    Raises:
        StoreError: if the disk cannot hold it.
    """
    with open(path, "xb") as file:
        for block in blocks:
            try:
                file.write(block)
            except OSError as error:
                raise StoreError(f"its local copy cannot be written: {error}") from error
        file.flush()
        os.fsync(file.fileno())
