"""Zeroth-order training from features: MeZO, PeZO and exact gradients with equal numbers of forward passes.

python -m benchmarks.zeroth_order.run --gpu --jobs 14 --threads 1 --seconds 250   # continues after a kill
python -m benchmarks.zeroth_order.run --gpu --collect                             # the tables of what is finished
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path

import torch

from .._common import describe_machine, make_parser, prepare, quiet, write_json
from .._partials import add_task_options, settle_run_options
from ..gpu.workload import describe_card
from ..headline.tasks import Task
from .jobs import Done, Job, Result, make_series, next_jobs, read_done
from .methods import OF_BOTH_STARTS, make_methods
from .tables import MACHINE, collect
from .tasks import TASKS
from .trainings import run_job

#: The tasks that this process, and those that it starts, has in memory.
_LOADED: dict[str, Task] = {}


def results_folder(options: argparse.Namespace) -> Path:
    """Where every training leaves its result."""
    return Path(options.output_dir) / ("gpu" if options.gpu else "cpu")


def run_and_write(job: Job, options: argparse.Namespace) -> tuple[Job, Result]:
    """Runs a job in a process of its own and writes the result at once."""
    quiet()
    torch.set_num_threads(options.threads)
    result = run_job(job, _LOADED[job.task], options) | asdict(job) | {"jobs": options.jobs}
    write_json(results_folder(options) / job.file, result)
    what = f"{job.method}, {job.rate:g}, eps {job.eps:g}" if job.method else "store and head"
    kind = "tuning" if job.is_tuning else f"seed {job.seed}"
    print(
        f"{job.task}, {job.start}, {what}, {kind}: {100 * result['accuracy']:.2f} %, {result['seconds']:.1f} s",
        flush=True,
    )
    return job, result


def run_all(options: argparse.Namespace) -> list[str]:
    """Runs what has no result yet, in forked processes which share the data; nothing begins after the deadline.

    Returns:
        What has failed.
    """
    deadline = time.time() + options.seconds
    for name in options.tasks:
        _LOADED[name] = TASKS[name].load(options)
    series = make_series(map(TASKS.__getitem__, options.tasks), OF_BOTH_STARTS, options.methods)
    done: Done = read_done(results_folder(options))
    running: dict[Future[tuple[Job, Result]], Job] = {}
    failures: dict[Job, str] = {}
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        while True:
            begun = {*running.values(), *failures}
            free = options.jobs - len(running) if time.time() < deadline else 0
            for job in next_jobs(series, done, options.seeds, begun.__contains__)[:free]:
                running[pool.submit(run_and_write, job, options)] = job
            if not running:
                return list(failures.values())
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                try:
                    done = {**done, job: future.result()[1]}
                except Exception:  # the others still have results
                    failures[job] = f"{job}\n{traceback.format_exc()}"
                    print(failures[job], flush=True)


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_task_options(parser, 16)
    parser.add_argument("--passes", type=int, help="forward passes of a training (default: the task's)")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=[method.name for method in make_methods()])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time; they share the cores")
    options = parser.parse_args(argv)
    if options.smoke:
        options.rows, options.test_rows, options.seeds, options.passes = 80, 32, [0, 1], 12
    settle_run_options(options, "zeroth_order", options.jobs)
    return options


def main() -> None:
    options = parse_options()
    prepare(options)
    failures: list[str] = []
    if not options.collect:
        failures = run_all(options)
        write_json(results_folder(options) / MACHINE, describe_machine() | (describe_card() if options.gpu else {}))
    collect(options, results_folder(options))
    if failures:
        raise SystemExit(f"{len(failures)} trainings failed, see above.")


if __name__ == "__main__":
    main()
