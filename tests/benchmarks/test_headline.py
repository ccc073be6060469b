"""Which trainings the headline runs, in which order, and with which learning rates."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks._common import write_json
from benchmarks.headline.jobs import MOST_RATES, TUNING_SEED, Job, Jobs
from benchmarks.headline.measurements import chosen_rate, read_done, result_file
from benchmarks.headline.tasks import RATES, Task

PLAIN, HALF, FROZEN = "plain 4", "half from 0 of 4", "half from 0 of 4, frozen only"


@pytest.fixture
def options(tmp_path: Path) -> Namespace:
    return Namespace(output_dir=str(tmp_path), gpu=False, arms=[PLAIN, HALF, FROZEN], seeds=[0, 1, 2, 3, 4])


@pytest.fixture
def task() -> Task:
    return Task("images", [0] * 10, [], lambda: None, lambda rows: rows, 2, 13, 6, 10)


def run(options: Namespace, job: Job, rate: float, accuracy: float) -> None:
    """Leaves a result, as a training does."""
    result = {"arm": job.arm.name, "learning_rate": rate, "seed": job.seed, "is_tuning": job.is_tuning}
    write_json(result_file(options, job.task, job.arm.name, rate, job.seed), result | {"accuracy": accuracy})


def run_all(options: Namespace, jobs: Jobs, accuracy_of) -> list[tuple[str, float, int]]:
    """Runs everything, one after the other."""
    order = []
    while (ready := jobs.take()) is not None:
        job, rate = ready
        run(options, job, rate, accuracy_of(job, rate))
        jobs.finish(job)
        order.append((job.arm.name, rate, job.seed))
    return order


def rates_of(order: list[tuple[str, float, int]], arm: str) -> list[float]:
    return [rate for name, rate, seed in order if name == arm and seed == TUNING_SEED]


def test_rates_are_tried_until_the_best_is_inside(options, task):
    best = {PLAIN: 2e-4, HALF: 1.6e-3}
    order = run_all(
        options, Jobs({task.name: task}, options), lambda job, rate: -abs(rate - best.get(job.arm.name, 0))
    )
    assert sorted(rates_of(order, PLAIN)) == list(RATES)
    assert sorted(rates_of(order, HALF)) == [*RATES, 8e-4, 1.6e-3, 3.2e-3]
    assert {rate for name, rate, seed in order if name == HALF and seed != TUNING_SEED} == {1.6e-3}


def test_rates_are_tried_a_limited_number_of_times(options, task):
    order = run_all(options, Jobs({task.name: task}, options), lambda job, rate: rate)
    assert len(rates_of(order, PLAIN)) == MOST_RATES


def test_an_arm_has_the_rate_of_the_arm_that_it_is_tuned_as(options, task):
    order = run_all(options, Jobs({task.name: task}, options), lambda job, rate: -abs(rate - 4e-4))
    assert not rates_of(order, FROZEN)
    assert {rate for name, rate, _ in order if name == FROZEN} == {chosen_rate(read_done(options, task.name), HALF)}


def test_seeds_wait_for_the_rates_and_other_trainings_do_not(options, task):
    jobs = Jobs({task.name: task}, options)
    taken = []
    while (ready := jobs.take()) is not None:
        taken.append(ready[0])
    assert len(taken) == 2 * len(RATES) and all(job.is_tuning for job in taken)
    for job in [job for job in taken if job.arm.name == PLAIN]:
        run(options, job, job.rate, -abs(job.rate - 2e-4))
        jobs.finish(job)
    job, rate = jobs.take()
    assert (job.arm.name, job.seed, rate) == (PLAIN, 0, 2e-4)


def test_every_task_gets_its_first_seeds_before_any_gets_the_others(options, task):
    tasks = {name: replace(task, name=name) for name in ("images", "texts")}
    jobs, order = Jobs(tasks, options), []
    while (ready := jobs.take()) is not None:
        run(options, *ready, -abs(ready[1] - 2e-4))
        jobs.finish(ready[0])
        order.append((ready[0].task, ready[0].seed))
    seeds = [seed for _, seed in order if seed != TUNING_SEED]
    assert max(place for place, seed in enumerate(seeds) if seed < 3) < min(
        place for place, seed in enumerate(seeds) if seed >= 3
    )
    assert len(seeds) == 2 * 3 * 5


def test_what_is_finished_is_not_trained_again(options, task):
    run_all(options, Jobs({task.name: task}, options), lambda job, rate: -abs(rate - 2e-4))
    assert Jobs({task.name: task}, options).take() is None


def test_an_arm_without_any_trial_is_left_out(options, task):
    jobs = Jobs({task.name: task}, options)
    while (ready := jobs.take()) is not None:
        jobs.finish(ready[0])  # failed: no result
    assert jobs.take() is None
