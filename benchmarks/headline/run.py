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
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait

import torch

from .._common import make_parser, prepare, quiet, write_json
from .._partials import add_task_options, settle_run_options
from .arms import make_arms, train_arm
from .jobs import Job, Jobs
from .measurements import result_file
from .tables import collect_task
from .tasks import TASKS, Task, load_task

#: What the processes that train, forked from this one, have in memory.
_TASKS: dict[str, Task] = {}


def run_job(job: Job, rate: float, options: argparse.Namespace) -> None:
    """Trains and writes the result."""
    quiet()
    torch.set_num_threads(options.threads)
    task = _TASKS[job.task]
    train, test = task.split() if job.is_tuning else (task.train, task.test)
    load = os.getloadavg()[0]
    result = train_arm(job.arm, rate, job.seed, task, train, test, options)
    result |= {"arm": job.arm.name, "seed": job.seed, "is_tuning": job.is_tuning, "load": load, "jobs": options.jobs}
    write_json(result_file(options, job.task, job.arm.name, rate, job.seed), result)
    print(
        f"{job.task}, {job.arm.name}, {rate:g}, seed {job.seed}: {100 * result['accuracy']:.2f} %, "
        f"{result['seconds']:.1f} s, {result['flops'] / 1e12:.2f} TFLOP",
        flush=True,
    )


def run_all(options: argparse.Namespace) -> list[str]:
    """Tunes, trains and evaluates all arms of all tasks, what has no result yet; returns what has failed."""
    deadline = time.time() + options.seconds
    for name in options.tasks:
        _TASKS[name] = load_task(name, options)
    jobs, running, failures = Jobs(_TASKS, options), dict[Future, Job](), []
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        while True:
            while len(running) < options.jobs and time.time() < deadline and (ready := jobs.take()) is not None:
                running[pool.submit(run_job, *ready, options)] = ready[0]
            if not running:
                return failures
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                jobs.finish(job)
                try:
                    future.result()
                except Exception:  # of a training: the other arms still have results
                    failures.append(f"{job.task}, {job.arm.name}, seed {job.seed}\n{traceback.format_exc()}")
                    print(failures[-1], flush=True)


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_task_options(parser, 32)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in make_arms()], help="(default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time; they share the cores")
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
        failures = run_all(options)
    for name in options.tasks:
        collect_task(name, options)
    if failures:
        raise SystemExit(f"{len(failures)} trainings failed, see above.")


if __name__ == "__main__":
    main()
