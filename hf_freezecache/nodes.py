"""The machines of a training: which of its processes share one, and so its disks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import distributed_c10d

from .distributed import Group

#: Environment variable that names the node of a process, where the launcher does not or is not to be believed.
NODE = "FREEZECACHE_NODE"


class UnknownNodesError(ValueError):
    """Nobody tells which processes share a machine."""


@dataclass(frozen=True)
class Nodes:
    """Which processes share a machine.

    Args:
        of: number of the node of every process, by rank; nodes count from 0 in the order of their first processes.
        rank: of this process.
    """

    of: tuple[int, ...] = (0,)
    rank: int = 0

    @classmethod
    def find(cls, group: Group) -> Nodes:
        """Those that the launcher tells, on all processes together.

        Raises:
            UnknownNodesError: on every process, if it does not tell them.
        """
        names = group.gather(_own_name(os.environ, group.rank))
        if group.size > 1 and None in names:
            raise UnknownNodesError(
                "cache_scope='node' tells machines apart by GROUP_RANK, or by RANK and LOCAL_WORLD_SIZE, as "
                f"`torchrun` and `accelerate launch` set them, and process {names.index(None)} has neither. Launch "
                f"the training with one of these, or set the environment variable {NODE} to a name of the machine."
            )
        numbers: dict[str | None, int] = {}
        return cls(tuple(numbers.setdefault(name, len(numbers)) for name in names), group.rank)

    @property
    def count(self) -> int:
        """Number of nodes."""
        return max(self.of) + 1

    @property
    def own(self) -> int:
        """The node of this process."""
        return self.of[self.rank]

    def group(self) -> Group:
        """The processes of this node; all processes call it together."""
        if self.count == 1:
            return Group(self.rank, len(self.of))
        members = [tuple(rank for rank, node in enumerate(self.of) if node == number) for number in range(self.count)]
        own = members[self.own]
        return NodeGroup(own.index(self.rank), len(own), self.own, own, _process_groups(tuple(members))[self.own])


@dataclass(frozen=True)
class NodeGroup(Group):
    """The processes of one node of several; the first of them does what is done once on its disk.

    Args:
        node: its number.
        ranks: of its processes among all.
        handle: of `torch.distributed`, for small objects on the CPU.
    """

    node: int = 0
    ranks: tuple[int, ...] = (0,)
    handle: Any = None

    def _broadcast(self, value: Any) -> Any:
        return self._gather(value if self.is_main else None)[0]

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self.handle)
        return values

    def number(self, rank: int) -> int:
        return self.ranks[rank]


def _own_name(environment: Mapping[str, str], rank: int) -> str | None:
    if environment.get(NODE):
        return environment[NODE]
    if environment.get("GROUP_RANK"):
        return f"group {environment['GROUP_RANK']}"
    local = environment.get("LOCAL_WORLD_SIZE", "")
    return f"group {rank // int(local)}" if local.isdecimal() and int(local) else None


# Of the processes as they are now: a process may leave them and join others.
_made: tuple[Any, dict[tuple[tuple[int, ...], ...], list[Any]]] = (None, {})


def _process_groups(members: tuple[tuple[int, ...], ...]) -> list[Any]:
    """Those of all nodes, made once: a search for hyperparameters trains many times in the same processes."""
    global _made
    world = distributed_c10d._get_default_group()
    if _made[0] is not world:
        _made = world, {}
    if members not in _made[1]:
        # Gloo: whatever the processes train on, these exchange objects on the CPU.
        _made[1][members] = [torch.distributed.new_group(list(ranks), backend="gloo") for ranks in members]
    return _made[1][members]
