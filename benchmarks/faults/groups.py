"""Trainings in two processes of which one is killed at a random moment: the other one ends, and both are resumed.

The moments begin when the processes have found each other: before that, only a launcher can know that one is dead.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from .kills import Moment, Story, Whole, find_debris, follow, kill_at, make_job
from .trainings import BATCH, Job, Running

PROCESSES = 2
#: Seconds after which a process must have ended whose neighbour is dead; a collective waits no longer than the first.
_TIMEOUT, _PATIENCE = 30, 60.0


def run_whole_group(plan: str, folder: Path) -> Whole:
    """Trains without a fault; the times are those of the main process.

    Raises:
        RuntimeError: if a process has failed, or the processes end with weights of their own.
    """
    first, *others = start_group(plan, folder, "log")
    try:
        whole = follow(plan, first)
        weights = {whole.outcome.weights, *(other.finish().weights for other in others)}
    finally:
        _end(others)
    if len(weights) > 1:
        raise RuntimeError(f"the processes of a training have ended with weights of their own: {folder}")
    return whole


def tell_story_of_group(moments: Sequence[Moment], whole: Whole, folder: Path, generator: random.Random) -> Story:
    """Trains, kills a process at each moment, waits for the end of the other, resumes, and compares what comes of it.

    Args:
        moments: of the kills.
        whole: the uninterrupted training.
        folder: an empty one.
        generator: draws who is killed.
    """
    plan, killed_in, processes = whole.plan, list[str](), list[int]()

    def tell(equal: bool, debris: Sequence[str] = (), failed: str | None = None) -> Story:
        return Story(plan, tuple(killed_in), equal, tuple(debris), failed, tuple(processes))

    victims = [generator.randrange(PROCESSES) for _ in moments]
    for number, (victim, moment) in enumerate(zip(victims, moments, strict=True)):
        group = start_group(plan, folder, f"log-{number}", resume=number > 0)
        killed = kill_at(group[victim], moment)
        waiting = [other for other in group if not _ends(other)]
        if waiting:
            return tell(False, failed=f"{_PATIENCE:.0f} s after its neighbour had died, a process still ran.")
        if killed:
            killed_in.append(group[victim].phase)
            processes.append(victim)
        elif any(each.outcome is None for each in group):
            return tell(False, failed="\n".join(each.log.read_text()[-3000:] for each in group))
    group = start_group(plan, folder, "log-last", resume=True)
    try:
        outcomes = [each.finish() for each in group]
    except RuntimeError as error:
        return tell(False, failed=str(error))
    finally:
        _end(group)
    debris = find_debris(folder / "stores", whole.outcome)
    shutil.rmtree(folder)
    return tell(all(outcome.weights == whole.outcome.weights for outcome in outcomes), debris)


def start_group(plan: str, folder: Path, name: str, resume: bool = False) -> list[Running]:
    """The processes of a training, which nobody looks after: no launcher ends the others where one dies.

    Args:
        plan: its settings.
        folder: for checkpoints, stores and logs.
        name: of the logs.
        resume: go on from the newest checkpoint, if there is one.
    """
    job = make_job(plan, folder, resume)
    arguments = {**job.arguments, "per_device_train_batch_size": BATCH // PROCESSES, "ddp_timeout": _TIMEOUT}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        Running(replace(job, arguments=arguments, prepare=partial(_join, rank, port)), f"{name}-{rank}.txt")
        for rank in range(PROCESSES)
    ]


def _join(rank: int, port: int, job: Job) -> Job:
    """Makes a process one of a group (gloo), with what a launcher would give it."""
    os.environ |= {
        "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(PROCESSES),
        "LOCAL_WORLD_SIZE": str(PROCESSES),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=_TIMEOUT))
    return job


def _end(group: Sequence[Running]) -> None:
    """Kills what still runs, where one of a group has failed."""
    for each in group:
        each.kill()


def _ends(running: Running) -> bool:
    """Whether a process ends in time; one that does not is killed."""
    begin = time.monotonic()
    while running.process.is_alive() and time.monotonic() - begin < _PATIENCE:
        running.listen(0)  # what it tells must not fill the pipe
        running.process.join(0.05)
    in_time = not running.process.is_alive()
    running.kill()
    return in_time
