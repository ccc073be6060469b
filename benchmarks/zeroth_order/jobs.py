"""What is measured, in which order: stores and heads, trials of learning rates and `eps`, then the seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .methods import EPS, FIRST, METHODS, OTHER_EPS, Method, make_methods
from .tasks import Learned

#: The seed of the trainings by which learning rates are chosen.
TUNING_SEED = 100
#: Learning rates are half a decade apart; a range is widened this often at most, on both sides together.
_STEPS, _MOST_WIDENED = (1, 3), 4

Result = dict[str, Any]
Start = str  #: "head start" or "new head"


@dataclass(frozen=True)
class Job:
    """One training, or what trainings begin with.

    Args:
        task: what is learned.
        start: `head start`, `new head`; or `preparation` of the store and the head of a seed.
        method: "" for a preparation.
        rate: the learning rate.
        eps: how far along a direction losses are looked at.
        seed: of everything random.
        is_tuning: whether it is evaluated on the validation samples, and does not train on them.
    """

    task: str
    start: str
    method: str
    rate: float
    eps: float
    seed: int
    is_tuning: bool

    @property
    def file(self) -> str:
        """Where its result is, in the folder of results."""
        name = f"{self.method}-{self.rate:g}-{self.eps:g}-{self.seed}{'-tuning' if self.is_tuning else ''}"
        return f"{self.task}/{self.start}/{name.replace(',', '')}.json".replace(" ", "_")


def preparation(task: str, seed: int, is_tuning: bool) -> Job:
    """The job that makes the store, if it is not there, and the head of a seed."""
    return Job(task, "preparation", "", 0.0, 0.0, seed, is_tuning)


Done = Mapping[Job, Result]


def read_done(folder: Path) -> dict[Job, Result]:
    """The results that are there."""
    done = {}
    for path in sorted(folder.glob("*/*/*.json")):
        result = json.loads(path.read_text())
        done[Job(**{name: result[name] for name in Job.__dataclass_fields__})] = result
    return done


def accuracy(result: Result) -> float:
    return float(result["accuracy"])


@dataclass(frozen=True)
class Series:
    """All trainings of a method from one start.

    Args:
        task: what is learned.
        start: head start or new head.
        method: how.
        half_decades: by how much a method's first learning rates are larger, if they are a task's own.
    """

    task: str
    start: str
    method: Method
    half_decades: int = 0

    @property
    def rates(self) -> list[float]:
        """Learning rates that are tried first."""
        shift = self.half_decades if self.method.follows_slope else 0
        return [neighbour(rate, shift) for rate in self.method.rates]

    @property
    def tuned(self) -> Series:
        """The series whose learning rate and distance it has."""
        return replace(self, method=METHODS[self.method.tuned_as]) if self.method.tuned_as else self

    def trial(self, rate: float, eps: float) -> Job:
        """The training by which a learning rate and a distance are judged."""
        return Job(self.task, self.start, self.method.name, rate, eps, TUNING_SEED, True)

    def trials(self, done: Done) -> dict[tuple[float, float], float]:
        """Accuracies on the validation samples, by learning rate and distance."""
        return {
            (job.rate, job.eps): accuracy(result)
            for job, result in done.items()
            if job.is_tuning and (job.task, job.start, job.method) == (self.task, self.start, self.method.name)
        }

    def missing_trials(self, done: Done) -> list[Job]:
        """Trials to be run next; none if a rate and a distance are chosen.

        The learning rate comes first. While the best one is at the edge of those that were tried, the next one beyond
        it is tried. Then comes the other distance, at the best learning rate.
        """
        if self.method.tuned_as:
            return self.tuned.missing_trials(done)
        eps = EPS if self.method.has_eps else 0.0
        jobs = [job for rate in self.rates if (job := self.trial(rate, eps)) not in done]
        if jobs:
            return jobs
        found = {rate: points for (rate, own), points in self.trials(done).items() if own == eps}
        rates = sorted(found)
        best = best_of(found)
        if best in (rates[0], rates[-1]) and len(rates) < len(self.rates) + _MOST_WIDENED:
            return [self.trial(neighbour(best, 1 if best == rates[-1] else -1), eps)]
        if self.method.has_eps and (job := self.trial(best, OTHER_EPS)) not in done:
            return [job]
        return []

    def chosen(self, done: Done) -> tuple[float, float] | None:
        """Learning rate and distance with the best accuracy on the validation samples; None before it is known."""
        if self.missing_trials(done):
            return None
        if self.method.tuned_as:
            return self.tuned.chosen(done)
        return best_of(self.trials(done))

    def finals(self, done: Done, seeds: Iterable[int]) -> list[Job]:
        """The trainings that are evaluated on the test samples."""
        chosen = self.chosen(done)
        if chosen is None:
            return []
        return [Job(self.task, self.start, self.method.name, *chosen, seed, False) for seed in seeds]


def best_of(points: Mapping[Any, float]) -> Any:
    """The key of the largest value, the smallest one of several."""
    return max(sorted(points), key=points.__getitem__)


def neighbour(rate: float, steps: int) -> float:
    """The learning rate so many steps up or down among 1, 3, 10, 30, ..."""
    digit, exponent = f"{rate:.0e}".split("e")
    place = 2 * int(exponent) + _STEPS.index(int(digit)) + steps
    return float(f"{_STEPS[place % 2]}e{place // 2}")


def make_series(tasks: Iterable[Learned], of_both: Iterable[str], only: Iterable[str] | None = None) -> list[Series]:
    """All series, the most important ones first: methods in their order, with the other start after the first ones.

    Args:
        tasks: what is learned.
        of_both: names of the methods that begin with both starts.
        only: names of methods; None: all.
    """
    methods = [method for method in make_methods() if not only or method.name in only]
    tasks, both = list(tasks), set(of_both)
    own = [Series(task.name, task.start, method, task.half_decades) for method in methods for task in tasks]
    other = [
        Series(task.name, task.other_start, method, task.half_decades)
        for method in methods
        if method.name in both
        for task in tasks
    ]
    first = FIRST * len(tasks)
    return [*own[:first], *other, *own[first:]]


def next_jobs(series: Iterable[Series], done: Done, seeds: Iterable[int], running: Callable[[Job], bool]) -> list[Job]:
    """Jobs that can begin now and are not running, the most important first.

    Args:
        series: in their order.
        done: what is finished.
        seeds: of the trainings that are evaluated on the test samples.
        running: whether a job has begun.
    """
    seeds, wanted = list(seeds), []
    tasks = dict.fromkeys(each.task for each in series)
    for task in tasks:
        for own, is_tuning in [([TUNING_SEED], True), (seeds, False)]:
            # The first one makes the store that the others read.
            jobs = [preparation(task, seed, is_tuning) for seed in own]
            wanted += jobs if jobs[0] in done else jobs[:1]
    for each in series:
        jobs = each.missing_trials(done) or each.finals(done, seeds)
        wanted += [job for job in jobs if preparation(each.task, job.seed, job.is_tuning) in done]
    return [job for job in dict.fromkeys(wanted) if job not in done and not running(job)]
