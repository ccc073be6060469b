"""Addresses of remote feature caches: what of fsspec's URLs is taken, and where their local copies are."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from huggingface_hub.constants import HF_HOME

#: Environment variable: folder of the local copies.
LOCAL_COPIES = "FREEZECACHE_LOCAL_COPIES"
_URL = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
#: What is to be installed for a protocol, where fsspec does not say it well.
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}


def is_url(directory: str | os.PathLike) -> bool:
    """Whether a feature cache directory is the URL of a remote one."""
    return isinstance(directory, str) and "://" in directory


def check_url(url: str) -> None:
    """Checks that a URL can be opened, as far as can be told without a connection.

    Raises:
        ValueError: if fsspec does not know its protocol, or it is not of the form `protocol://place`.
        ImportError: if its protocol needs a package that is not installed; the message says which.
    """
    import fsspec

    match = _URL.fullmatch(url)
    if match is None or "::" in url or not match["rest"].strip("/"):
        raise ValueError(
            f"feature_cache_dir={url!r} is no URL of a remote folder: write 'protocol://place', e.g. "
            "'s3://bucket/prefix'; chains of protocols ('::') are not taken."
        )
    if "@" in match["rest"].partition("/")[0]:
        raise ValueError(
            "feature_cache_dir: URLs with names or passwords are not taken, as they would be logged. Set them as the "
            "protocol's own environment variables, or in a configuration file of fsspec."
        )
    protocol = match["protocol"].lower()
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        remedy = f"pip install {package}" if package is not None else str(error)
        raise ImportError(f"feature_cache_dir={url!r}: {protocol}:// needs a package: {remedy}.") from error
    except ValueError as error:
        raise ValueError(f"feature_cache_dir={url!r}: fsspec does not know {protocol}://.") from error


def local_copy(url: str) -> Path:
    """The folder of the local copy of a remote feature cache.

    It is in the folder that the environment variable `FREEZECACHE_LOCAL_COPIES` names, in `HF_HOME/freezecache` if it
    names none, and the same for every training on this machine.
    """
    place = os.environ.get(LOCAL_COPIES) or os.path.join(HF_HOME, "freezecache")
    readable = re.sub(r"[^A-Za-z0-9]+", "-", url).strip("-")[:60]
    return Path(place) / f"{readable}-{hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:16]}"
