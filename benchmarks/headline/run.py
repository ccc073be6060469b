"""Accuracy against seconds and FLOPs: plain training of several lengths, freezing, caching and head starts.

python -m benchmarks.headline.run --tasks caltech-224 --jobs 2      # continues after a kill
python -m benchmarks.headline.run --tasks caltech-224 --collect     # the table of what is finished
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch

from .._common import make_parser, prepare, quiet, write_json
from .._partials import settle_run_options
from .arms import Arm, make_arms, train_arm
from .measurements import chosen_rates, read_done, result_file
from .tables import collect_task
from .tasks import TASKS, Task, load_task

#: The seed of the trainings by which learning rates are chosen.
TUNING_SEED = 100
#: The task that this process, and those that it starts, has in memory.
_TASK: Task | None = None


@dataclass(frozen=True)
class Job:
    """One training.

    Args:
        arm: what to train.
        rate: its learning rate.
        seed: of everything random.
        is_tuning: whether it is evaluated on the validation samples.
    """

    arm: Arm
    rate: float
    seed: int
    is_tuning: bool


def tuning_jobs(arms: Iterable[Arm], task: Task) -> list[Job]:
    """Every learning rate of every arm that has its own."""
    return [Job(arm, rate, TUNING_SEED, True) for arm in arms if not arm.tuned_as for rate in arm.rates(task)]


def final_jobs(arms: list[Arm], rates: dict[str, float], seeds: Iterable[int]) -> list[Job]:
    """Every arm with every seed, in another order for each seed."""
    jobs = []
    for seed in seeds:
        turn = seed * 5 % len(arms)
        for arm in [*arms[turn:], *arms[:turn]]:
            jobs.append(Job(arm, rates[arm.tuned_as or arm.name], seed, False))
    return jobs


def run_job(job: Job, deadline: float, options: argparse.Namespace) -> None:
    """Trains and writes the result; nothing after the deadline."""
    if time.time() > deadline:
        return
    assert _TASK is not None
    quiet()
    torch.set_num_threads(options.threads)
    train, test = _TASK.split() if job.is_tuning else (_TASK.train, _TASK.test)
    load = os.getloadavg()[0]
    result = train_arm(job.arm, job.rate, job.seed, _TASK, train, test, options)
    result |= {"arm": job.arm.name, "seed": job.seed, "is_tuning": job.is_tuning, "load": load, "jobs": options.jobs}
    write_json(result_file(options, _TASK.name, job.arm.name, job.rate, job.seed), result)
    print(
        f"{_TASK.name}, {job.arm.name}, {job.rate:g}, seed {job.seed}: {100 * result['accuracy']:.2f} %, "
        f"{result['seconds']:.1f} s, {result['flops'] / 1e12:.2f} TFLOP",
        flush=True,
    )


def run_jobs(jobs: list[Job], deadline: float, options: argparse.Namespace) -> list[str]:
    """Runs the jobs that have no result yet, in forked processes which share the data.

    Returns:
        What has failed.
    """
    assert _TASK is not None
    done = read_done(options, _TASK.name)
    jobs = [job for job in jobs if (job.arm.name, job.rate, job.seed) not in done]
    failures = []
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        running = {pool.submit(run_job, job, deadline, options): job for job in jobs}
        for future, job in running.items():
            try:
                future.result()
            except Exception:  # the other arms still have results
                failures.append(f"{job.arm.name}, {job.rate:g}, seed {job.seed}\n{traceback.format_exc()}")
                print(failures[-1], flush=True)
    return failures


def run_task(name: str, options: argparse.Namespace) -> list[str]:
    """Tunes, trains and evaluates all arms of a task; returns what has failed."""
    global _TASK
    deadline = time.time() + options.seconds
    _TASK = load_task(name, options)
    suitable = [arm for arm in make_arms() if arm.suits(_TASK)]
    arms = [arm for arm in suitable if not options.arms or arm.name in options.arms]
    missing = {arm.tuned_as for arm in arms if arm.tuned_as} - {arm.name for arm in arms}
    tuned = arms + [arm for arm in suitable if arm.name in missing]
    failures = run_jobs(tuning_jobs(tuned, _TASK), deadline, options)
    rates = chosen_rates(options, name, tuned)
    arms = [arm for arm in arms if (arm.tuned_as or arm.name) in rates]
    return failures + run_jobs(final_jobs(arms, rates, options.seeds), deadline, options)


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--minilm", help="folder with MiniLM's files (default: that of its package)")
    parser.add_argument("--rows", type=int, help="training samples (default: 2,020 images, 4,000 texts)")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--test_rows", type=int, help="test samples (default: all)")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in make_arms()], help="(default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time; they share the cores")
    parser.add_argument("--gpu", action="store_true", help="train on the GPU, in bf16; results go to gpu/")
    parser.add_argument("--seconds", type=float, default=1e9, help="no training of a task begins later than this")
    parser.add_argument("--collect", action="store_true", help="make tables and plots, train nothing")
    parser.add_argument("--output_dir", help="folder of stores and of single results (default: below outputs/)")
    options = parser.parse_args(argv)
    if options.smoke:
        options.rows, options.test_rows, options.seeds = 64, 32, [0, 1]
    settle_run_options(options, "headline", options.jobs)
    return options


def main() -> None:
    options = parse_options()
    prepare(options)
    failures: list[str] = []
    if not options.collect:
        for name in options.tasks:
            failures += run_task(name, options)
    for name in options.tasks:
        collect_task(name, options)
    if failures:
        raise SystemExit(f"{len(failures)} trainings failed, see above.")


if __name__ == "__main__":
    main()
