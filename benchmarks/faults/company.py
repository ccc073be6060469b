"""Trainings that need one store at the same time, and `freezecache clean --yes` beside a training."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from hf_freezecache import FreezeCacheTrainer
from hf_freezecache.cache.shards import ShardWriter
from hf_freezecache.cli.main import main

from .moments import MOMENTS
from .trainings import UPFRONT, WRITTEN, Job, Outcome, Running, find_remains, start

_ONE = {"freeze_points": "1:2", "codec": "int4"}
#: Longest wait for another process, in seconds.
_PATIENCE = 120.0
#: A training stands still here, while the command runs beside it: name -> settings and moment.
CLEANINGS = {
    "building": (_ONE, "in a shard"),
    "deepening": (UPFRONT, "in the deepened shard"),
    "write-through": (WRITTEN, "in a writing epoch"),
    "replaying": (_ONE, "in epoch 2"),
}


# Races


@dataclass(frozen=True)
class Race:
    """Trainings that need the same store at the same time.

    Args:
        built: stores that they have built together.
        waited: how many have waited for another one.
        equal: whether all have the final weights of one that runs alone.
        remains: what is left of stores that are not complete, in words.
    """

    built: int
    waited: int
    equal: bool
    remains: tuple[str, ...]


def race(folder: Path, alone: Outcome, trainings: int = 2) -> Race:
    """Trains several times at once with one feature cache directory.

    Args:
        folder: an empty one.
        alone: the same training alone.
        trainings: how many.
    """
    job = Job(folder, _ONE, stores=folder / "stores", disturb=_build_slowly)
    running = [Running(replace(job, folder=folder / str(number))) for number in range(trainings)]
    outcomes = [each.finish() for each in running]
    stores, remains = find_remains(folder / "stores")
    waited = [any("Waiting for the feature store" in message for message in each.messages) for each in outcomes]
    return Race(
        built=sum(outcome.built for outcome in outcomes),
        waited=sum(waited),
        equal=all(outcome.weights == alone.weights and outcome.replayed for outcome in outcomes),
        remains=remains if len(stores) == 1 else (*remains, f"{len(stores)} stores"),
    )


def train_alone(folder: Path) -> Outcome:
    """The training of a race, alone."""
    return Running(Job(folder, _ONE)).finish()


def _build_slowly(trainer: FreezeCacheTrainer, job: Job) -> None:
    write = ShardWriter.write

    def slow(self, *args):
        write(self, *args)
        time.sleep(0.3)

    ShardWriter.write = slow


# Cleaning


@dataclass(frozen=True)
class Cleaning:
    """The command beside a training that uses stores, and after it.

    Args:
        removed_beside: bytes that it has removed beside the training.
        equal: whether the final weights are those of the training alone.
        rebuilt: stores that the training has built or written more than alone.
        left_after: what is in the directory when the command has run after the training.
    """

    removed_beside: int
    equal: bool
    rebuilt: int
    left_after: tuple[str, ...]


def clean_beside(name: str, folder: Path) -> Cleaning:
    """Runs `freezecache clean --yes` while a training stands still at some moment, and again after it.

    Args:
        name: key of `CLEANINGS`.
        folder: an empty one.
    """
    settings, moment = CLEANINGS[name]
    arguments = {"eval_strategy": "epoch"} if settings.get("cache_eval") else {}
    alone = Running(Job(folder / "alone", settings, arguments)).finish()
    job = Job(folder / "run", settings, arguments)
    running = Running(replace(job, disturb=partial(_stand_still, moment)))
    _wait_for(lambda: (job.folder / "reached").exists(), f"a training that is {name}")
    removed = _clean(job.cache_dir, folder)
    (job.folder / "go").touch()
    outcome = running.finish()
    _clean(job.cache_dir, folder)
    left = tuple(sorted(str(path.relative_to(job.cache_dir)) for path in job.cache_dir.rglob("*")))
    return Cleaning(removed, outcome.weights == alone.weights, outcome.built - alone.built, left)


def _stand_still(moment: str, trainer: FreezeCacheTrainer, job: Job) -> None:
    def wait() -> None:
        (job.folder / "reached").touch()
        _wait_for(lambda: (job.folder / "go").exists(), "the command")

    MOMENTS[moment](trainer, wait)


def _wait_for(happens: Callable[[], bool], what: str) -> None:
    begin = time.monotonic()
    while not happens():
        if time.monotonic() - begin > _PATIENCE:
            raise TimeoutError(f"nothing was heard of {what}.")
        time.sleep(0.01)


def _clean(stores: Path, folder: Path) -> int:
    """Runs the command in a process of its own; returns the bytes that it has removed."""
    before = _size(stores)
    process = start(_run_command, stores, folder / "command.txt")
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the command ended with {process.exitcode}: {(folder / 'command.txt').read_text()}")
    return before - _size(stores)


def _run_command(stores: Path, output: Path) -> None:
    with open(output, "w") as file:
        sys.stdout = sys.stderr = file
        main(["clean", str(stores), "--yes"])


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
