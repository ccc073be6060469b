"""Disks that fill, or cannot be written any more, while a training uses them: real file systems in memory.

A training mounts a small one in a namespace of its own, which ends with its process. Linux alone has these; some
systems do not allow them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hf_freezecache import FreezeCacheTrainer

from .moments import MOMENTS
from .trainings import Job, Marks, Outcome, Running, make_trainer, start

_NEW_MOUNTS, _NEW_USER, _READ_ONLY, _REMOUNT, _PRIVATE, _RECURSIVE = 0x20000, 0x10000000, 1, 32, 1 << 18, 1 << 14
#: Bytes and files of the small disk: room for what these trainings store, until something else fills it.
_BYTES, _FILES = 4 << 20, 200


# File systems


def own_namespace() -> None:
    """Gives this process mounts of its own.

    Raises:
        OSError: if the system does not allow it.
    """
    user, group = os.getuid(), os.getgid()
    _call("unshare", _NEW_MOUNTS | _NEW_USER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _call("mount", None, b"/", None, _PRIVATE | _RECURSIVE, None)


def mount_small(folder: Path) -> None:
    """Mounts a small file system in memory on a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={_BYTES},nr_inodes={_FILES}".encode()
    _call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options)


def make_read_only(folder: Path) -> None:
    """Lets nobody write to a mounted file system any more, as the system does when a disk has errors."""
    _call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", _REMOUNT | _READ_ONLY, None)


def _call(name: str, *arguments: Any) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def why_impossible() -> str | None:
    """Why file systems cannot be mounted here; None if they can."""
    process = start(_try, os.getpid())
    process.join()
    return None if process.exitcode == 0 else "this system lets nobody mount a file system in a namespace of his own"


def _try(parent: int) -> None:
    try:
        own_namespace()
        mount_small(Path(f"/tmp/hf-freezecache-mount-{parent}"))
    except OSError:
        os._exit(1)
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(f"/tmp/hf-freezecache-mount-{parent}")


def fill(folder: Path) -> None:
    """Somebody else's file takes all that is left of a disk, to the last byte."""
    with open(folder / "of-somebody-else", "ab", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass


def fill_inodes(folder: Path) -> None:
    """Somebody else's files take all the inodes of a disk."""
    other = folder / "of-somebody-else.d"
    with contextlib.suppress(OSError):
        other.mkdir(exist_ok=True)
        for number in range(_FILES):
            (other / str(number)).touch()


# Experiments


@dataclass(frozen=True)
class DiskFault:
    """Something that a disk does at one moment of a training.

    Args:
        settings: of `FreezeCacheConfig`.
        moment: when; key of `MOMENTS`, or "first": before the training is made.
        how: what happens; key of `_FAULTS`.
        message: part of a warning that tells it; None: nothing is lost, and nothing told.
        replayed: whether the last epoch reads a store all the same.
        has_stores: whether an earlier training has left its stores on the disk.
    """

    settings: Mapping[str, Any]
    moment: str
    how: str
    message: str | None
    replayed: bool = False
    has_stores: bool = False


_ONE = {"freeze_points": "1:2", "codec": "fp32"}
_DEEPER = {"freeze_points": "1:2,3:3", "codec": "fp32", "deepen": "cache"}
_WRITTEN = {**_ONE, "materialize": "write_through"}
_EVALUATED = {**_ONE, "cache_eval": True}
_NOT_BUILT, _NOT_WRITTEN = "could not be built", "could not be written"

#: By name. Features are stored as fp32, so that a training on them is the freeze-only one to the last bit.
DISK_FAULTS = {
    "fills in a build": DiskFault(_ONE, "in a shard", "fills", _NOT_BUILT),
    "fills in a deepening": DiskFault(_DEEPER, "in the second shard", "fills", _NOT_BUILT),
    "fills in the build of a cached evaluation": DiskFault(
        _EVALUATED, "in the second shard", "fills", "There is no store of the evaluation set", replayed=True
    ),
    "fills while epochs write a store": DiskFault(_WRITTEN, "in a writing epoch", "fills", _NOT_WRITTEN),
    "is full before epochs write a store": DiskFault(_WRITTEN, "in epoch 0", "fills", _NOT_BUILT),
    "is full before a build": DiskFault(_ONE, "in epoch 0", "fills", _NOT_BUILT),
    "has no inodes left before a build": DiskFault(_ONE, "in epoch 0", "has no inodes left", _NOT_BUILT),
    "has no inodes left while epochs write a store": DiskFault(
        _WRITTEN, "in a writing epoch", "has no inodes left", _NOT_WRITTEN
    ),
    "fills in a replay epoch": DiskFault(_ONE, "in epoch 2", "fills", None, replayed=True),
    "is full when a store is reused": DiskFault(_ONE, "first", "fills", None, replayed=True, has_stores=True),
    "is read-only before a build": DiskFault(_ONE, "in epoch 0", "is read-only", _NOT_BUILT),
    "is read-only in a replay epoch": DiskFault(_ONE, "in epoch 2", "is read-only", None, replayed=True),
    "is read-only in the replay before a deeper store": DiskFault(_DEEPER, "in epoch 2", "is read-only", _NOT_BUILT),
    "is read-only when a store is reused": DiskFault(
        _ONE, "first", "is read-only", None, replayed=True, has_stores=True
    ),
}


@dataclass(frozen=True)
class DiskStory:
    """A training whose disk failed.

    Args:
        fault: name of what happened.
        equal: whether the final weights are those of the same freezing without a cache.
        told: whether a warning tells it; also if there is nothing to tell and nothing was told.
        replayed: whether the last epoch reads a store exactly if one could be kept.
        remains: what is left of stores that are not complete.
        failed: the error of a training that did not end; None: it has ended.
    """

    fault: str
    equal: bool
    told: bool
    replayed: bool
    remains: tuple[str, ...]
    failed: str | None = None

    @property
    def survived(self) -> bool:
        """Whether nothing was lost or is wrong."""
        return self.equal and self.told and self.replayed and not self.remains and self.failed is None


def freeze_only_settings(fault: DiskFault) -> dict[str, Any]:
    """Settings of the training of a fault without a cache."""
    return {"freeze_points": fault.settings["freeze_points"], "cache": "never"}


def run_freeze_only(fault: DiskFault, folder: Path) -> Outcome:
    """The training of a fault without cache and fault."""
    return Running(Job(folder, freeze_only_settings(fault), _arguments(fault))).finish()


def run_fault(name: str, folder: Path, frozen: Outcome) -> DiskStory:
    """Trains with stores on a small disk that fails.

    Args:
        name: key of `DISK_FAULTS`.
        folder: for checkpoints, the log and the mounted disk; an empty one.
        frozen: what came of the training without cache and fault.
    """
    fault = DISK_FAULTS[name]
    disturb = None if fault.moment == "first" else partial(_disturb, fault)
    job = Job(folder, fault.settings, _arguments(fault), prepare=partial(_mount, fault), disturb=disturb)
    try:
        outcome = Running(job).finish()
    except RuntimeError as error:
        return DiskStory(name, False, False, False, (), failed=str(error))
    told = [message for message in outcome.messages if any(part in message for part in _TOLD)]
    remains = outcome.remains
    if fault.how == "is read-only":  # what cannot be deleted: that of a dead process counts for nothing
        remains = tuple(name for name in remains if "/.lease-" not in name)
    return DiskStory(
        name,
        equal=outcome.weights == frozen.weights,
        told=not told if fault.message is None else any(fault.message in message for message in told),
        replayed=outcome.replayed == fault.replayed,
        remains=remains,
    )


_TOLD = (_NOT_BUILT, _NOT_WRITTEN, "There is no store of the evaluation set", "cannot be read", "could not be reused")


def _arguments(fault: DiskFault) -> dict[str, Any]:
    # In all of them: the loader of an evaluation draws a random number, with any `Trainer`.
    return {"eval_strategy": "epoch"}


def _mount(fault: DiskFault, job: Job) -> Job:
    own_namespace()
    disk = job.folder / "disk"
    mount_small(disk)
    job = replace(job, stores=disk / "stores")
    if fault.has_stores:
        make_trainer(replace(job, folder=job.folder / "earlier"), Marks(None)).train()
    if fault.moment == "first":
        _FAULTS[fault.how](disk)
    return job


def _disturb(fault: DiskFault, trainer: FreezeCacheTrainer, job: Job) -> None:
    MOMENTS[fault.moment](trainer, partial(_FAULTS[fault.how], job.cache_dir.parent))


_FAULTS: Mapping[str, Callable[[Path], None]] = {
    "fills": fill,
    "has no inodes left": fill_inodes,
    "is read-only": make_read_only,
}
