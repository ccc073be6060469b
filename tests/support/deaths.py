"""What ends one process of a training, or makes one of its images unreadable."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from hf_freezecache.cache.shards import ShardWriter


class UnreadableImage(Exception):
    """What a transform raises."""


class Images(torch.utils.data.Dataset):
    """Rows of a data set, which may become unreadable for this process.

    Attributes:
        unreadable: whether they are.
    """

    def __init__(self, rows: Any):
        self.rows, self.unreadable = rows, False

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict:
        if self.unreadable:
            raise UnreadableImage(f"image {row} is truncated")
        return self.rows[row]


def die(how: str) -> None:
    """Ends this process at once, without a word to the others."""
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(13)


class AtStep(TrainerCallback):
    """Calls a function at the beginning of an optimizer step."""

    def __init__(self, step: int, act: Callable[[], None]):
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def dies_in_step(images: Images, fault: dict) -> list[TrainerCallback]:
    return [AtStep(fault["step"], lambda: die(fault["how"]))]


def dies_in_build(images: Images, fault: dict) -> list[TrainerCallback]:
    write = ShardWriter.write

    def dying(self, first, *args, **kwargs):
        write(self, first, *args, **kwargs)
        die(fault["how"])

    ShardWriter.write = dying
    return []


def dies_at_checkpoint(images: Images, fault: dict) -> list[TrainerCallback]:
    """Where `Trainer` saves the process's generators, after the weights of the main one."""
    Trainer._save_rng_state = lambda self, folder: die(fault["how"])
    return []


def unreadable(images: Images, fault: dict) -> list[TrainerCallback]:
    """The images that are read from a step on, in whatever order the epoch has them."""
    return [AtStep(fault["step"], lambda: setattr(images, "unreadable", True))]


def unreadable_at_first(images: Images, fault: dict) -> list[TrainerCallback]:
    images.unreadable = True
    return []


def unreadable_in_build(images: Images, fault: dict) -> list[TrainerCallback]:
    """Once a shard is begun."""
    enter = ShardWriter.__enter__

    def entering(self):
        images.unreadable = True
        return enter(self)

    ShardWriter.__enter__ = entering
    return []


def stands_still(images: Images, fault: dict) -> list[TrainerCallback]:
    """For longer than anybody waits, but not for ever."""

    def wait() -> None:
        signal.alarm(60)  # the default action of the signal ends the process
        signal.pause()

    return [AtStep(fault["step"], wait)]


FAULTS = {
    function.__name__: function
    for function in (
        dies_in_step,
        dies_in_build,
        dies_at_checkpoint,
        unreadable,
        unreadable_at_first,
        unreadable_in_build,
        stands_still,
    )
}
