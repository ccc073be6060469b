"""The most bytes that a folder holds while the package writes into it."""

import os
import sys
from pathlib import Path

import hf_freezecache

_PACKAGE = Path(hf_freezecache.__file__).parent
#: Where stores are written, renamed and removed.
_WRITERS = tuple(str(_PACKAGE / folder) for folder in ("build", "cache", "training"))


def total_bytes(folder: Path | str) -> int:
    """Bytes of all files below a folder."""
    if not os.path.isdir(folder):
        return 0
    with os.scandir(folder) as entries:  # much faster than `Path.rglob`
        return sum(total_bytes(entry.path) if entry.is_dir() else entry.stat().st_size for entry in entries)


class LargestTotal:
    """Measures a folder before every line that the package's writing modules run, and after the last one.

    A line that calls a library makes one step: it creates a file, grows it, renames it or removes it. So no total is
    missed but one that rises and falls again inside a single call into a library.

    Args:
        folder: need not exist yet.
    """

    def __init__(self, folder: Path):
        self.folder, self.largest, self.measured = folder, 0, 0

    def _measure(self) -> None:
        self.largest = max(self.largest, total_bytes(self.folder))
        self.measured += 1

    def _trace(self, frame, event, arg):
        return self._trace_line if frame.f_code.co_filename.startswith(_WRITERS) else None

    def _trace_line(self, frame, event, arg):
        self._measure()
        return self._trace_line

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *error):
        sys.settrace(self._before)
        self._measure()
