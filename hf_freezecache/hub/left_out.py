"""Feature stores are never uploaded, in whatever folder they lie, and no file with a token."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

#: How the directories of stores are named, of those that are written or deleted as well; see `cache.names`.
_STORE = "[0-9a-f]" * 32
_ENDS = ("", ".partial", ".tmp-*", ".partial.tmp-*", ".removed.tmp-*", ".partial.removed.tmp-*")


def store_patterns(folder: Path, cache_dir: Path) -> list[str]:
    """Patterns, as `HfApi.upload_folder` takes them, of what belongs to feature stores in a folder.

    Args:
        folder: that is to be uploaded.
        cache_dir: where a training keeps its stores, wherever that is.
    """
    patterns = [f"{start}{_STORE}{end}/*" for end in _ENDS for start in ("", "*/")]
    folder, cache_dir = folder.expanduser().resolve(), cache_dir.expanduser().resolve()
    if cache_dir != folder and cache_dir.is_relative_to(folder):
        patterns.append(f"{glob.escape(cache_dir.relative_to(folder).as_posix())}/*")
    return patterns


@contextmanager
def stores_left_out(cache_dir: Path, others: Sequence[str] = ()) -> Iterator[None]:
    """Inside, a folder that is uploaded to the Hub is uploaded without feature stores, in the background as well.

    `Trainer` leaves out what begins with `_` only, and takes no patterns of others.

    Args:
        cache_dir: where the training keeps its stores.
        others: names of files that are left out as well.
    """
    upload = HfApi.upload_folder

    @wraps(upload)
    def upload_without_stores(
        api: HfApi, *, folder_path: Any, ignore_patterns: list[str] | str | None = None, **settings: Any
    ) -> Any:
        ignored = [ignore_patterns] if isinstance(ignore_patterns, str) else [*(ignore_patterns or ())]
        ignored += store_patterns(Path(folder_path), cache_dir)
        ignored += [f"{start}{name}" for name in others for start in ("", "*/")]
        return upload(api, folder_path=folder_path, ignore_patterns=ignored, **settings)

    HfApi.upload_folder = upload_without_stores  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        HfApi.upload_folder = upload  # type: ignore[method-assign]
