"""Where a training's stores are, and which processes see them: found out before anything is stored."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..build.context import BuildContext
from ..cache.directories import create_aside, discard_aside
from ..cache.names import SEEN
from ..cache.remote import RemoteStores
from ..cache.urls import is_url, local_copy
from ..config import CACHE_FOLDER, FreezeCacheConfig
from ..distributed import Group
from ..nodes import NODE, Nodes
from ..replay.node_order import Dealing

if TYPE_CHECKING:
    from .session import FreezeSession

#: Seconds for which a process looks for what another one has made: network disks need a moment.
_PATIENCE = 5.0


def store_directory(config: FreezeCacheConfig, output_dir: str | os.PathLike) -> Path:
    """The directory of a training's stores; of a remote place, that of its local copies.

    Args:
        config: the settings.
        output_dir: of the training.
    """
    configured = config.feature_cache_dir
    if configured is None:
        return Path(output_dir) / CACHE_FOLDER
    return local_copy(configured) if is_url(configured) else Path(configured)


@dataclass(frozen=True)
class Scope:
    """Which processes see the directory of the stores.

    Args:
        nodes: of the training; a single one where all processes see the same directory.
        disk: the processes that see this process's directory.
        why_not: why nothing can be cached; None if it can.
        is_blind: whether that is because some processes do not see the directory of others.
    """

    nodes: Nodes
    disk: Group
    why_not: str | None = None
    is_blind: bool = False

    @classmethod
    def without(cls, group: Group, why_not: str | None) -> Scope:
        """One disk of all processes; nobody looks at it."""
        return cls(Nodes((0,) * group.size, group.rank), group, why_not)

    @classmethod
    def find(cls, group: Group, config: FreezeCacheConfig, directory: Path) -> Scope:
        """Asks the launcher, or looks at the directory, on all processes together.

        Args:
            group: all processes.
            config: the settings.
            directory: of the stores.

        Raises:
            UnknownNodesError: on every process, if nodes store shares and nobody tells which there are.
        """
        if config.cache_scope == "node":
            nodes = Nodes.find(group)
        else:
            nodes = Nodes((0,) * group.size, group.rank)
        disk = nodes.group() if nodes.count > 1 else group
        remedy = (
            "or cache_scope='node' where each machine has a disk of its own"
            if config.cache_scope == "shared"
            else f"or tell by {NODE} which of them are on one machine"
        )
        found = group.gather(_why_not_seen(disk, directory, remedy))
        why_not = next((reason for reason in found if reason is not None), None)
        return cls(nodes, disk, why_not, is_blind=why_not is not None)

    def of(self, context: BuildContext) -> BuildContext:
        """A training whose stores are here."""
        configured = context.config.feature_cache_dir
        remote = RemoteStores(configured) if configured is not None and is_url(configured) else None
        return replace(context, disk_group=self.disk, remote=remote)

    def deal(self, session: FreezeSession, loader: Any) -> None:
        """Tells a training which node reads which rows, if each stores its share.

        Args:
            session: the training.
            loader: as `Trainer` made it.

        Raises:
            OrderError: if the rows cannot be read so.
        """
        if self.nodes.count > 1 and session.keeper.why_not is None:
            rows = len(session.context.source)
            session.switch.dealing = Dealing.of(loader, self.nodes, rows)
            session.keeper.provider.counts = session.switch.dealing.counts(rows)


def _why_not_seen(group: Group, directory: Path, remedy: str) -> str | None:
    """Why a directory is not the same for some processes: the main one makes a directory in it that all look for.

    Where nothing can be written, nobody can tell: what is stored there is opened by all or by none.

    Args:
        group: of the processes.
        directory: need not exist.
        remedy: besides another directory.
    """
    if group.size == 1:
        return None
    made: list[Path] = []

    def make() -> str | None:
        try:
            made.extend(path for path in (directory, *directory.parents) if not path.exists())
            return create_aside(directory / SEEN).name
        except OSError:  # a build says so, where there is one
            return None

    name = group.on_main(make)
    # Every process looks at its own directory: it may have another path.
    seen = name is None or _sees(directory / name)
    places = group.gather(None if seen else f"process {group.number(group.rank)} on {socket.gethostname()}")
    if group.is_main:
        if name is not None:
            discard_aside(directory / name)
        with contextlib.suppress(OSError):  # of an empty directory, which nobody minds
            for path in made:
                path.rmdir()
    blind = [place for place in places if place is not None]
    if not blind:
        return None
    return (
        f"the directory of feature stores, {directory}, is not the same for all processes: {', '.join(blind[:3])}"
        f"{' and others' if len(blind) > 3 else ''} did not see what process {group.number(0)} has made "
        f"there. Set feature_cache_dir to a directory that all of them see, {remedy}."
    )


def _sees(path: Path) -> bool:
    deadline = time.monotonic() + _PATIENCE
    while not path.is_dir():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
