"""Small files that anybody may have written: never more of one is read than it may hold."""

from __future__ import annotations

import os
import stat
from pathlib import Path

#: Bytes of a manifest, or of another file of JSON beside the shards, at most. Python's lists take up to 24 times the
#: bytes of their JSON. A manifest of a store of a thousand shards has 200 kB.
LARGEST_JSON = 1 << 22


def read_small(path: Path, most: int) -> bytes:
    """The content of a small file.

    Args:
        path: of the file. A link is not followed, and a pipe not waited for.
        most: bytes that it may have.

    Raises:
        ValueError: if it has more, or is no regular file.
        OSError: if it is missing, a link, or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{path} is not a file.")
        content = b""
        while len(content) <= most and (part := os.read(descriptor, most + 1 - len(content))):
            content += part
    finally:
        os.close(descriptor)
    if len(content) > most:
        raise ValueError(f"{path} has more than {most} bytes.")
    return content
