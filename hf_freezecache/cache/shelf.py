"""Tensors that wait for their use: in memory, and what does not fit there in a temporary file."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from ..units import show_bytes


@dataclass(frozen=True)
class InMemory:
    """A tensor that is kept as it is."""

    tensor: torch.Tensor

    def read(self) -> torch.Tensor:
        """The tensor."""
        return self.tensor


@dataclass(frozen=True)
class InFile:
    """A tensor that lies in a file.

    Args:
        file: open for reading.
        offset: where its bytes begin.
        shape, dtype: of the tensor.
    """

    file: IO[bytes]
    offset: int
    shape: torch.Size
    dtype: torch.dtype

    def read(self) -> torch.Tensor:
        """The tensor, read anew.

        Raises:
            OSError: if the disk fails.
        """
        data = bytearray(self.shape.numel() * self.dtype.itemsize)
        self.file.seek(self.offset)
        if self.file.readinto(data) != len(data):  # type: ignore[attr-defined]  # a file that is open for bytes has it
            raise OSError("a temporary file has become shorter.")
        return torch.frombuffer(data, dtype=self.dtype).reshape(self.shape)


class TensorShelf:
    """Keeps tensors: in memory as long as they fit there, then in a temporary file.

    The file has no name where the system allows that, so that nothing is left of it even if the process is killed.

    Args:
        directory: where the file is; it is made if it is missing.
        memory: bytes that tensors may take in memory.
        room: tells the bytes that the file may take; it is asked when memory is full.

    Attributes:
        why_full: why nothing more was kept, as the end of a sentence; None if everything was.
    """

    def __init__(self, directory: Path, memory: int, room: Callable[[], int]):
        self.directory, self.memory, self._ask_room = directory, memory, room
        self.why_full: str | None = None
        self._file: IO[bytes] | None = None
        self._room = self._taken = self._written = 0
        self._made_directory = False

    @property
    def bytes_in_file(self) -> int:
        """Bytes of the tensors in the file."""
        return self._written

    def add(self, tensor: torch.Tensor) -> InMemory | InFile | None:
        """Keeps a tensor, on the CPU.

        Returns:
            Where it is; None if there is no room left for it.
        """
        size = tensor.numel() * tensor.element_size()
        if not size or self._taken + size <= self.memory:
            self._taken += size
            return InMemory(tensor)
        try:
            file = self._open()
            if self._written + size > self._room:
                self.why_full = f"{show_bytes(self._room)} of the disk and of `cache_budget` are left"
                return None
            file.seek(self._written)
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)
            file.flush()
        except OSError as error:  # a full disk, or one that cannot be written
            self.why_full = f"a temporary file cannot be written ({error})"
            return None
        kept = InFile(file, self._written, tensor.shape, tensor.dtype)
        self._written += size
        return kept

    def close(self) -> None:
        """Deletes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._made_directory:
            with contextlib.suppress(OSError):  # others have put something there meanwhile
                self.directory.rmdir()

    def _open(self) -> IO[bytes]:
        if self._file is None:
            self._room = self._ask_room()
            self._made_directory = not self.directory.exists()
            self.directory.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self.directory)
        return self._file
