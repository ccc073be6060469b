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
    """Rows of a data set, of which one may become unreadable.

    Attributes:
        unreadable: its number; None: all can be read.
    """

    def __init__(self, rows: Any):
        self.rows, self.unreadable = rows, None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict:
        if row == self.unreadable:
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
    """From a step on, in whatever order rows come: all are unreadable."""

    def spoil() -> None:
        type(images).__getitem__ = lambda self, row: (_ for _ in ()).throw(
            UnreadableImage(f"image {row} is truncated")
        )

    return [AtStep(fault["step"], spoil)]


def unreadable_in_build(images: Images, fault: dict) -> list[TrainerCallback]:
    images.unreadable = fault["row"]
    return []


FAULTS = {
    function.__name__: function
    for function in (dies_in_step, dies_in_build, dies_at_checkpoint, unreadable, unreadable_in_build)
}
