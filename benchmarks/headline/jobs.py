"""Which training comes next: learning rates, until the best is inside of those that were tried, and then seeds."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

from .arms import Arm, make_arms
from .measurements import chosen_rate, read_done, trials_of
from .tasks import Task

#: The seed of the trainings by which learning rates are chosen.
TUNING_SEED = 100
#: With how many learning rates an arm is tried, at most.
MOST_RATES = 6
#: Seeds with which every task is trained before any task is trained with the others.
FIRST_SEEDS = 3


@dataclass(frozen=True)
class Job:
    """One training.

    Args:
        task: its name.
        arm: what to train.
        seed: of everything random.
        rate: the learning rate; None: what its tuning chooses.
    """

    task: str
    arm: Arm
    seed: int
    rate: float | None = None

    @property
    def is_tuning(self) -> bool:
        """Whether it is evaluated on the validation samples."""
        return self.rate is not None

    @property
    def tuning(self) -> tuple[str, str]:
        """The task and the arm whose trials choose the learning rate."""
        return self.task, self.arm.tuned_as or self.arm.name


class Jobs:
    """The trainings that have no result yet, in their order.

    Args:
        tasks: by name.
        options: arms, seeds and where results are.
    """

    def __init__(self, tasks: Mapping[str, Task], options: argparse.Namespace):
        self._options = options
        self._running: set[Job] = set()
        self._waiting: list[Job] = []
        self._trials: set[Job] = set()
        for part in (options.seeds[:FIRST_SEEDS], options.seeds[FIRST_SEEDS:]):
            for task in tasks.values():
                self._add(task, part)

    def _add(self, task: Task, seeds: list[int]) -> None:
        named = self._options.arms
        suitable = [arm for arm in make_arms() if arm.suits(task)]
        arms = [arm for arm in suitable if (arm.name in named if named else task.has_all_arms or arm.is_core)]
        tuned = {arm.tuned_as or arm.name for arm in arms}
        for arm in suitable:
            if arm.name in tuned:
                for rate in arm.rates(task):
                    self._try(Job(task.name, arm, TUNING_SEED, rate), len(self._waiting))
        for seed in seeds:
            turn = seed * 5 % len(arms)
            self._waiting += [Job(task.name, arm, seed) for arm in [*arms[turn:], *arms[:turn]]]

    def _try(self, job: Job, place: int) -> None:
        """Adds a trial of a learning rate, once."""
        if job not in self._trials:
            self._trials.add(job)
            self._waiting.insert(place, job)

    def take(self) -> tuple[Job, float] | None:
        """The next training that can begin, with its learning rate; None if all that are left wait for others."""
        for job in list(self._waiting):
            if not job.is_tuning and self._is_in_tuning(job.tuning):
                continue
            self._waiting.remove(job)
            done = read_done(self._options, job.task)
            rate = job.rate or chosen_rate(done, job.tuning[1])
            if rate is not None and (job.arm.name, rate, job.seed) not in done:
                self._running.add(job)
                return job, rate
            self._extend(job)
        return None

    def finish(self, job: Job) -> None:
        """Takes note that a training has ended, well or not."""
        self._running.remove(job)
        self._extend(job)

    def _is_in_tuning(self, tuning: tuple[str, str]) -> bool:
        """Whether trials of an arm are still to come or under way."""
        return any(job.is_tuning and job.tuning == tuning for job in [*self._waiting, *self._running])

    def _extend(self, job: Job) -> None:
        """After the last trial of an arm: another one where the best learning rate is the smallest or the largest."""
        if not job.is_tuning or self._is_in_tuning(job.tuning):
            return
        done = read_done(self._options, job.task)
        trials, best = trials_of(done, job.arm.name), chosen_rate(done, job.arm.name)
        if best is None or len(trials) >= MOST_RATES:
            return
        if best == min(trials):
            self._try(Job(job.task, job.arm, job.seed, best / 2), 0)
        if best == max(trials):
            self._try(Job(job.task, job.arm, job.seed, best * 2), 0)
