"""Files of a store that are held open while it is in use.

What is read through an open file stays readable when the file is removed or replaced, and a file that was cut short
gives an error where mapped memory would end the process.
"""

from __future__ import annotations

import hashlib
import os
import stat
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from .manifest import REBUILD, StoreError


class Readable(Protocol):
    """What the columns of a store are read from."""

    name: str
    size: int

    def read(self, size: int, offset: int) -> bytes:
        """Reads bytes at an offset.

        Raises:
            StoreError: if they are not there.
        """

    def read_rows(self, target: memoryview, offsets: Sequence[int]) -> None:
        """Reads parts of equal size, one after the other into memory, from an offset each.

        Raises:
            StoreError: if they are not there.
        """

    def check_unchanged(self) -> None:
        """Raises StoreError if the content is not what it was when it was written."""

    def verify(self) -> None:
        """The same, by reading all of it."""


class MemoryFile:
    """A file that is no file: bytes in memory.

    Args:
        content: the bytes.
        name: for error messages.
    """

    def __init__(self, content: bytes | memoryview, name: str = "memory"):
        self.name, self.size, self._content = name, len(content), memoryview(content).cast("B")

    def read(self, size: int, offset: int) -> bytes:
        return bytes(self._content[offset : offset + size])

    def read_rows(self, target: memoryview, offsets: Sequence[int]) -> None:
        size = len(target) // len(offsets)
        for place, offset in enumerate(offsets):
            target[place * size : (place + 1) * size] = self._content[offset : offset + size]

    def check_unchanged(self) -> None:
        pass

    def verify(self) -> None:
        pass


class FileState(NamedTuple):
    """What changes with a file's content, and `links`, which only counts its names. Times are in nanoseconds."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int
    links: int

    @classmethod
    def of(cls, descriptor: int) -> FileState:
        status = os.fstat(descriptor)
        return cls(
            status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_nlink
        )

    def only_unlinked(self, later: FileState) -> bool:
        """Whether nothing but the number of names changed: somebody removed the file."""
        return self.links != later.links and self._replace(changed=later.changed, links=later.links) == later


class HeldFile:
    """A file of a store, open for reading as long as this object lives, in processes forked from this one as well.

    Args:
        path: of the file, for error messages.
        descriptor: of the open file; this object closes it.
        size: that the file must have.
        sha256: of its content.
        state: in which the file was verified; None: the present one.

    Raises:
        StoreError: if it is no regular file, or has another size.
    """

    def __init__(self, path: Path, descriptor: int, size: int, sha256: str, state: FileState | None = None):
        self.path, self.descriptor, self.size, self.sha256 = path, descriptor, size, sha256
        self.name = str(path)
        self._finalizer = weakref.finalize(self, os.close, descriptor)
        now = FileState.of(descriptor)
        self.state = now if state is None else state
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise StoreError(f"{path} is not a file: {REBUILD}.")
        self._check_size(now)

    def read(self, size: int, offset: int) -> bytes:
        try:
            content = os.pread(self.descriptor, size, offset)
        except OSError as error:
            raise self._unreadable(error) from error
        if len(content) < size:
            if not content:
                raise self._cut_short()
            content += self.read(size - len(content), offset + len(content))  # a signal may interrupt a read
        return content

    def read_rows(self, target: memoryview, offsets: Sequence[int]) -> None:
        read, descriptor, size, first = os.preadv, self.descriptor, len(target) // len(offsets), 0
        try:
            for offset in offsets:
                last = first + size
                count = read(descriptor, (target[first:last],), offset)
                if count != size:  # a signal may interrupt a read
                    target[first + count : last] = self.read(size - count, offset + count)
                first = last
        except OSError as error:
            raise self._unreadable(error) from error

    def verify(self) -> None:
        """Reads the whole file and compares its sha256.

        Raises:
            StoreError: if it differs.
            OSError: if the file cannot be read.
        """
        state = FileState.of(self.descriptor)
        self._check_size(state)
        total, offset = hashlib.sha256(), 0
        while block := os.pread(self.descriptor, 1 << 20, offset):
            total.update(block)
            offset += len(block)
        if total.hexdigest() != self.sha256:
            raise StoreError(f"{self.path} is damaged (sha256 differs): {REBUILD}.")
        self.state = state

    def check_unchanged(self) -> None:
        """Verifies the file if anybody has changed it since it was last verified or opened; otherwise costs nothing.

        Raises:
            StoreError: if its content is another one, or it cannot be read.
        """
        try:
            state = FileState.of(self.descriptor)
            if state == self.state:
                return
            if self.state.only_unlinked(state):
                self.state = state
                return
            self.verify()
        except OSError as error:
            raise self._unreadable(error) from error

    def close(self) -> None:
        """Closes the file; it cannot be read any more."""
        self._finalizer()

    def _check_size(self, state: FileState) -> None:
        if state.size != self.size:
            raise StoreError(f"{self.path} has {state.size} bytes instead of {self.size}: {REBUILD}.")

    def _cut_short(self) -> StoreError:
        return StoreError(f"{self.path} was cut short while it was in use: {REBUILD}.")

    def _unreadable(self, error: OSError) -> StoreError:
        return StoreError(f"{self.path} cannot be read any more: {error}.")


def read_all(descriptor: int, size: int) -> bytes:
    """The content of an open file of a known size; shorter if the file is."""
    content = b""
    while part := os.pread(descriptor, size - len(content), len(content)):
        content += part
    return content


def open_file(path: Path) -> int:
    """Opens a regular file of a store for reading; returns its descriptor.

    Raises:
        StoreError: if it is missing, a link, or no file.
        OSError: if it cannot be opened.
    """
    try:
        # Non-blocking: to open a pipe would wait for somebody who writes to it.
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing: {REBUILD}.") from error
    except OSError as error:
        if path.is_symlink() or path.is_socket():
            raise StoreError(f"{path} is not a file: {REBUILD}.") from error
        raise
