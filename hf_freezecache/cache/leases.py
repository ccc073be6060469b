"""Leases: how a process tells others that it uses the directory of a store.

A lease is a small file in the directory. It says which process holds it; its time of change is a heartbeat, which a
thread of that process renews. A lease is dead if its process is: that can be looked up where the process can be seen,
i.e. on the same machine since the same start and in the same namespace of processes. Elsewhere, e.g. from another
container, a heartbeat that has stopped for long shows it.

Leases prevent needless work, not damage: who reads a store holds its files open, whatever happens to their names.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import psutil

from .names import AsideName
from .small_files import read_small

_PREFIX = ".lease-"
#: Bytes of a lease at most.
_LARGEST = 1 << 14
#: Seconds between heartbeats, and without one after which a process that cannot be seen counts as dead.
_HEARTBEAT, STALE_AFTER = 60, 3600
#: Seconds without a change after which a build on another machine that has no lease counts as dead.
_DEAD_AFTER = 24 * 3600


@dataclass(frozen=True)
class Holder:
    """A process that holds a lease.

    Args:
        host: name of its machine.
        boot: names the time since the machine was started; empty where the system does not tell.
        namespace: in which the process has its number; empty where the system does not tell.
        process: its number.
        started: when it was started; numbers are used again.
    """

    host: str
    boot: str
    namespace: str
    process: int
    started: float

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"

    @classmethod
    def this(cls) -> Holder:
        """This process."""
        return _this(os.getpid())

    def is_seen_from(self, other: Holder) -> bool:
        """Whether the other process can look up this one by its number."""
        return (self.host, self.boot, self.namespace) == (other.host, other.boot, other.namespace)

    def is_alive(self, silent: float, stale_after: float) -> bool:
        """Whether the process still runs.

        Args:
            silent: seconds since its last heartbeat.
            stale_after: after how many of them it counts as dead if it cannot be seen from here.
        """
        if self.is_seen_from(Holder.this()):
            return _started(self.process) == self.started
        return silent < stale_after


class Lease:
    """A lease of this process; `take` makes it.

    Args:
        file: its file.
    """

    def __init__(self, file: Path):
        self.file, self._process = file, os.getpid()
        self._finalizer = weakref.finalize(self, _release, file, self._process)
        _renewer.add(self)

    @classmethod
    def take(cls, directory: Path) -> Lease | None:
        """Takes a lease, and deletes those of dead processes there.

        Args:
            directory: of a store.

        Returns:
            The lease; None where nothing can be written: then nobody is told, and nobody can delete by mistake what
            he cannot write.
        """
        file = directory / f"{_PREFIX}{uuid.uuid4().hex[:12]}"
        try:
            for dead in _files(directory):
                if not _is_live(dead, STALE_AFTER):
                    dead.unlink(missing_ok=True)
            file.write_text(json.dumps(asdict(Holder.this())), encoding="utf-8")
        except OSError:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)  # a full disk leaves an empty file
            return None
        return cls(file)

    def renew(self) -> None:
        """Gives a heartbeat."""
        with contextlib.suppress(OSError):  # the directory may be gone: nobody needs the lease then
            os.utime(self.file)

    def release(self) -> None:
        """Ends the lease."""
        self._finalizer()

    def moved(self, directory: Path) -> None:
        """Follows the directory to its new name."""
        self._finalizer.detach()
        self.file = directory / self.file.name
        self._finalizer = weakref.finalize(self, _release, self.file, self._process)


def holders(directory: Path, stale_after: float = STALE_AFTER, own: bool = True) -> list[Holder | None]:
    """The living processes that hold leases of a directory.

    Args:
        directory: of a store; need not exist.
        stale_after: see `Holder.is_alive`.
        own: whether to list this process as well.

    Returns:
        The processes; None for one whose lease cannot be read, e.g. as it is just being written.
    """
    found = []
    for file in _files(directory):
        holder = _read(file)
        if _is_live(file, stale_after) and (own or holder != Holder.this()):
            found.append(holder)
    return found


def has_leases(directory: Path) -> bool:
    """Whether there are leases of a directory, of living or dead processes."""
    return any(True for _ in _files(directory))


def is_built(directory: Path, aside: AsideName) -> bool:
    """Whether the process that has begun a directory is still writing it, or may be.

    Args:
        directory: in which a store is built.
        aside: its name.
    """
    if has_leases(directory):
        return bool(holders(directory))
    if aside.host == socket.gethostname():  # of a release without leases, or killed before it took one
        return psutil.pid_exists(aside.process)
    return changed_within(directory, _DEAD_AFTER)


def changed_within(directory: Path, seconds: float) -> bool:
    """Whether anything in a directory but a lease has changed lately."""
    newest = 0.0
    for file in (directory, *directory.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            newest = max(newest, 0.0 if file.name.startswith(_PREFIX) else file.stat().st_mtime)
    return time.time() - newest < seconds


def describe(found: list[Holder | None]) -> str:
    """Names processes for people."""
    return ", ".join(sorted({"another process" if holder is None else str(holder) for holder in found}))


def _files(directory: Path) -> Iterator[Path]:
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    yield from (directory / name for name in sorted(names) if name.startswith(_PREFIX))


def _read(file: Path) -> Holder | None:
    try:
        content = json.loads(read_small(file, _LARGEST))
        holder = Holder(**content)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    is_valid = all(type(getattr(holder, name)) is str for name in ("host", "boot", "namespace"))
    return holder if is_valid and type(holder.process) is int and type(holder.started) in (int, float) else None


def _is_live(file: Path, stale_after: float) -> bool:
    holder = _read(file)
    try:
        silent = time.time() - file.lstat().st_mtime
    except FileNotFoundError:
        return False
    return silent < stale_after if holder is None else holder.is_alive(silent, stale_after)


def _release(file: Path, process: int) -> None:
    if os.getpid() == process:  # a fork has the lease of the process that took it
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


@cache
def _this(process: int) -> Holder:
    boot = namespace = ""
    with contextlib.suppress(OSError):  # not on macOS
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return Holder(socket.gethostname(), boot, namespace, process, _started(process) or 0)


def _started(process: int) -> float | None:
    """When a process of this machine was started; None if there is none."""
    try:
        # Ticks since the machine was started, which setting the clock does not change.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else int(fields[19])
    except (FileNotFoundError, ProcessLookupError):
        try:
            return psutil.Process(process).create_time()  # not Linux, where the process is gone
        except psutil.NoSuchProcess:
            return None


class _Renewer:
    """Renews the leases of this process in a thread, which begins with the first one."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """A fork has no thread, and no leases of its own."""
        self._leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._runs, self._lock = False, threading.Lock()

    def add(self, lease: Lease) -> None:
        with self._lock:
            self._leases.add(lease)
            if not self._runs:
                self._runs = True
                threading.Thread(target=self._run, name="hf_freezecache-leases", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(_HEARTBEAT)
            with self._lock:
                for lease in list(self._leases):
                    lease.renew()


_renewer = _Renewer()
os.register_at_fork(after_in_child=_renewer.forget)
