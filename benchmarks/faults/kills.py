"""Trainings that are killed at random moments and resumed, until they end."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .trainings import PHASES, UPFRONT, WRITTEN, Job, Outcome, Running, find_remains

#: Settings by name, and those of the Trainer: some checkpoints are amid an epoch.
PLANS: dict[str, dict[str, Any]] = {"upfront": UPFRONT, "write-through": WRITTEN}
_SAVES = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 2}
#: A training is killed at most so often before it is left to end.
MOST_KILLS = 3
#: Longest delay of a kill in a phase that begins once, in seconds: a little more than it lasts.
_LONGEST = 1.0


@dataclass(frozen=True)
class Moment:
    """When a training is killed.

    Args:
        delay: seconds after the beginning of the phase; without one, after the beginning of the training.
        phase: in which it is to be killed; None: in whatever it does then.
        times: how often the phase has begun before it counts.
    """

    delay: float
    phase: str | None = None
    times: int = 1


@dataclass(frozen=True)
class Story:
    """A training that was killed, and resumed until it ended.

    Args:
        plan: its settings.
        killed_in: what it was doing at each kill.
        equal: whether the final weights are those of the uninterrupted training.
        debris: what is left that should not be, in words.
        failed: the error of a resumed training that could not go on; None: none.
        processes: which one was killed, of a training that has several.
    """

    plan: str
    killed_in: tuple[str, ...]
    equal: bool
    debris: tuple[str, ...]
    failed: str | None = None
    processes: tuple[int, ...] = ()

    @property
    def survived(self) -> bool:
        """Whether nothing was lost or is wrong."""
        return self.equal and not self.debris and self.failed is None


@dataclass(frozen=True)
class Whole:
    """The uninterrupted training of a plan.

    Args:
        plan: its settings.
        outcome: what came of it.
        timeline: what it did when, from its beginning on, in seconds.
    """

    plan: str
    outcome: Outcome
    timeline: tuple[tuple[float, str], ...]

    @property
    def phases(self) -> list[str]:
        """What it did."""
        return [phase for phase in PHASES if any(phase == found for _, found in self.timeline)]

    @property
    def seconds(self) -> float:
        """From its beginning to its end."""
        return self.timeline[-1][0]


def make_job(plan: str, folder: Path, resume: bool = False) -> Job:
    """A training of a plan, with checkpoints; evaluations, where the plan caches them."""
    # By steps: any `Trainer` saves an epoch's last step before it evaluates the epoch, which draws a random number.
    evaluates = {"eval_strategy": "steps", "eval_steps": 4} if PLANS[plan].get("cache_eval") else {}
    return Job(folder, PLANS[plan], {**_SAVES, **evaluates}, resume=resume)


def run_whole(plan: str, folder: Path) -> Whole:
    """Trains without a fault."""
    return follow(plan, Running(make_job(plan, folder)))


def follow(plan: str, running: Running) -> Whole:
    """Notes what a training does until it ends.

    Args:
        plan: its settings.
        running: that has just been started.
    """
    timeline = []
    while (phase := running.listen(None)) is not None:
        timeline.append((time.monotonic(), phase))
    outcome, begin = running.finish(), timeline[0][0]
    timeline.append((time.monotonic(), "ended"))
    return Whole(plan, outcome, tuple((moment - begin, phase) for moment, phase in timeline))


def draw_moments(generator: random.Random, whole: Whole, first: str | None) -> list[Moment]:
    """Moments at which a training is killed, one after the other.

    Args:
        generator: of random numbers.
        whole: the uninterrupted training.
        first: phase of the first one; None: it is drawn from all the time that the training takes. The second one may
            be in the resuming; the others are drawn from all the time.
    """
    moments = [Moment(generator.uniform(0, whole.seconds)) if first is None else _steered(generator, whole, first)]
    if generator.random() < 0.3:
        moments.append(Moment(generator.uniform(0, _LONGEST), "resuming"))
    while len(moments) < MOST_KILLS and generator.random() < 0.3:
        moments.append(Moment(generator.uniform(0, whole.seconds)))
    return moments


def _steered(generator: random.Random, whole: Whole, phase: str) -> Moment:
    spans = list(zip(whole.timeline, whole.timeline[1:], strict=False))
    lengths = [after - before for (before, found), (after, _) in spans if found == phase]
    number = generator.randrange(len(lengths))
    return Moment(generator.uniform(0, lengths[number]), phase, number + 1)


def tell_stories(
    wholes: Mapping[str, Whole],
    seed: int,
    kills: int,
    folder: Path,
    phases: Sequence[str | None],
    tell: Callable[[Sequence[Moment], Whole, Path, random.Random], Story] | None = None,
) -> Iterator[Story]:
    """Trainings that are killed, until there were so many kills; those that meet no kill count for nothing.

    Args:
        wholes: the uninterrupted trainings.
        seed: of the moments.
        kills: in all.
        folder: an empty one.
        phases: of the first kill of each training, in turn; None: drawn from all its time.
        tell: runs a training that is killed at some moments; None: `tell_story`.
    """
    generator, number = random.Random(seed), 0
    tell = tell or tell_story
    while kills > 0:
        phase = phases[number % len(phases)]
        plan = generator.choice([name for name, whole in wholes.items() if phase is None or phase in whole.phases])
        moments = draw_moments(generator, wholes[plan], phase)[:kills]
        story = tell(moments, wholes[plan], folder / str(number), generator)
        number, kills = number + 1, kills - len(story.killed_in)
        if story.killed_in or not story.survived:
            yield story


def tell_story(moments: Sequence[Moment], whole: Whole, folder: Path, generator: random.Random) -> Story:
    """Trains, kills at each moment, resumes, and compares what comes of it.

    A moment behind the end of a training kills nothing and is not counted.

    Args:
        moments: of the kills.
        whole: the uninterrupted training.
        folder: an empty one.
        generator: of random numbers; none are drawn.
    """
    plan, killed_in = whole.plan, list[str]()
    for number, moment in enumerate(moments):
        running = Running(make_job(plan, folder, resume=number > 0), f"log-{number}.txt")
        if kill_at(running, moment):
            killed_in.append(running.phase)
        elif running.outcome is None:
            return Story(plan, tuple(killed_in), False, (), failed=running.log.read_text()[-3000:])
    try:
        outcome = Running(make_job(plan, folder, resume=True), "log-last.txt").finish()
    except RuntimeError as error:
        return Story(plan, tuple(killed_in), False, (), failed=str(error))
    debris = find_debris(folder / "stores", whole.outcome)
    shutil.rmtree(folder)
    return Story(plan, tuple(killed_in), outcome.weights == whole.outcome.weights, tuple(debris))


def kill_at(running: Running, moment: Moment) -> bool:
    """Kills a process at a moment; False if it has ended before."""
    begin, seen = time.monotonic(), 0
    while moment.phase is not None and seen < moment.times:
        found = running.listen(None)
        if found is None:
            break
        seen += found == moment.phase
    if moment.phase is None:
        running.listen(None)  # until it begins
        begin = time.monotonic()
        while time.monotonic() - begin < moment.delay:
            if running.listen(max(0, moment.delay - (time.monotonic() - begin))) is None:
                break
    else:
        time.sleep(moment.delay)
    running.kill()
    return running.outcome is None and running.process.exitcode < 0


def find_debris(stores: Path, whole: Outcome) -> list[str]:
    """What is in a feature cache directory beside the undamaged stores of the uninterrupted training, in words.

    Args:
        stores: the directory.
        whole: the uninterrupted training.
    """
    found, remains = find_remains(stores)
    debris = [*remains, *(f"{name} is too much" for name in found if name not in whole.stores)]
    return debris + [f"{name} is missing" for name in whole.stores if name not in found]
