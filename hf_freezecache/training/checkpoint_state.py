"""Checkpoints that are complete, and the entry of a training in `trainer_state.json`, of this version and the last."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..model.checkpoint import CheckpointError
from .callback import STATE_VERSION

#: Names that `Trainer` gives to a checkpoint, and to the file that it writes last.
_CHECKPOINT, _LAST_FILE = re.compile(r"checkpoint-(?P<step>[0-9]+)"), "trainer_state.json"


def find_checkpoints(directory: Path) -> tuple[list[Path], list[Path]]:
    """The checkpoints in the output folder of a training.

    `Trainer` writes `trainer_state.json` last, so that a checkpoint without a whole one was being written, or deleted,
    when the process was killed.

    Args:
        directory: the output folder; need not exist.

    Returns:
        Complete and incomplete ones, each in the order of their steps.
    """
    found = []
    for path in directory.iterdir() if directory.is_dir() else ():
        match = _CHECKPOINT.fullmatch(path.name)
        if match is not None and path.is_dir():
            found.append((int(match["step"]), path))
    ordered = [path for _, path in sorted(found)]
    complete = [path for path in ordered if _is_complete(path)]
    return complete, [path for path in ordered if path not in complete]


def _is_complete(checkpoint: Path) -> bool:
    try:
        return isinstance(json.loads((checkpoint / _LAST_FILE).read_bytes()), dict)
    except (FileNotFoundError, ValueError):
        return False


def read_state(entry: Any) -> Mapping[str, Any] | None:
    """What a checkpoint says of a training.

    Args:
        entry: the callback's, from `TrainerState.stateful_callbacks`; None if there is none.

    Returns:
        The attributes that `FreezeCallback.state` wrote; None if nothing was frozen or cached there.

    Raises:
        CheckpointError: if this release cannot continue from it.
    """
    if entry is None:
        return None
    if isinstance(entry, list):
        raise CheckpointError(
            "the checkpoint holds the state of several `FreezeCallback`s: the trainer adds its own, so leave it out "
            "of `callbacks`."
        )
    attributes = entry["attributes"]
    if not attributes.get("session"):
        return None
    version = attributes.get("version", 1)
    if version == 1:
        return _from_version_1(attributes)
    if version != STATE_VERSION:
        raise CheckpointError(
            f"the checkpoint's freezing state has version {version}, and this release of hf_freezecache reads version "
            f"{STATE_VERSION}: resume it with the release that wrote it, or with a newer one."
        )
    return attributes


def read_untrained(entry: Mapping[str, Any]) -> bool:
    """Whether a training has begun from an initialization, so that the defaults have frozen nothing in it."""
    return bool(entry["attributes"].get("was_untrained", False))


def _from_version_1(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Version 1 knew no version; it described the source of an epoch in five places."""
    session = attributes["session"]
    caching, writing = session.get("caching") or {}, session.get("write_through") or {}
    decisions = caching.get("decisions", {})
    writing_cut, upfront_cut = writing.get("cut", -1), writing.get("gave_up", -1)
    live_cuts = {writing_cut, writing.get("done", -1)} - {-1, upfront_cut}
    cuts = {store: int(cut) for cut, (_, store, _) in decisions.items()}
    stores = []
    for store in caching.get("stores", []):
        evaluation_cut = store["evaluation_cut"]
        stores.append(
            {
                "name": store["name"],
                "bytes": store["bytes"],
                "built": store["built"],
                "cut": cuts.get(store["name"], writing_cut) if evaluation_cut is None else evaluation_cut,
                "is_evaluation": evaluation_cut is not None,
            }
        )
    source: dict[str, Any] = {"kind": "images", "cut": max(session.get("declined_cut", -1), 0), "why": None}
    if writing_cut >= 0:
        problem = writing.get("problem")
        source = {
            "kind": "writing",
            "cut": writing_cut,
            "store": writing["fingerprint"],
            "start": writing["start"],
            "epoch": attributes["decided_epoch"],
            "problem": None if problem is None else [problem[0] == "misfit", problem[1], problem[2]],
        }
    elif caching.get("current") is not None and session.get("declined_cut", -1) != attributes["cut"]:
        source = {"kind": "store", "cut": caching["current"][1]}
    return {
        **attributes,
        "version": STATE_VERSION,
        "session": {
            "source": source,
            "stores": {
                "decisions": {
                    cut: {"codec": codec, "store": store, "parent": parent, "written": int(cut) in live_cuts}
                    for cut, (codec, store, parent) in decisions.items()
                },
                "channel_weights": caching.get("channel_weights", {}),
                "stores": stores,
            },
            "phases": session.get("phases", []),
            "flops": {
                "samples": session.get("samples", 0),
                "plain_flops_per_sample": session.get("plain_flops_per_sample"),
            },
        },
    }
