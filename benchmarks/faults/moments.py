"""Moments in a training at which something is made to happen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from transformers import TrainerCallback

from hf_freezecache import FreezeCacheTrainer
from hf_freezecache.build.partial import PartialStore
from hf_freezecache.cache.shards import ShardWriter


class _AtStep(TrainerCallback):
    def __init__(self, step: int, act: Callable[[], None]):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def at_step(step: int, trainer: FreezeCacheTrainer, act: Callable[[], None]) -> None:
    """Arranges that something happens after an optimizer step."""
    trainer.add_callback(_AtStep(step, act))


def _in_shard(number: int, trainer: FreezeCacheTrainer, act: Callable[[], None]) -> None:
    """In the writing of a build's shard, after its first batch."""
    write, files = ShardWriter.write, list[Path]()

    def write_and_act(self, *args):
        write(self, *args)
        if self.path not in files:
            files.append(self.path)
            if len(files) == number:
                act()

    ShardWriter.write = write_and_act


def _in_writing(trainer: FreezeCacheTrainer, act: Callable[[], None]) -> None:
    """After the first batch that an epoch has written."""
    write, acted = PartialStore.write, list[bool]()

    def write_and_act(self, *args):
        write(self, *args)
        if not acted:
            acted.append(True)
            act()

    PartialStore.write = write_and_act


#: By name: takes the trainer and what is to happen once. Stores and shards are counted in the order of their builds.
MOMENTS: Mapping[str, Callable[[FreezeCacheTrainer, Callable[[], None]], None]] = {
    "in epoch 0": partial(at_step, 3),
    "in epoch 2": partial(at_step, 10),
    "in a shard": partial(_in_shard, 1),
    "in the second shard": partial(_in_shard, 2),
    "in the deepened shard": partial(_in_shard, 3),
    "in a writing epoch": _in_writing,
}
