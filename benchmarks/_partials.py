"""Measurements of a long run, seed by seed, so that a killed run can be continued."""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ._common import REPOSITORY, available_cores, write_json


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a long run of several seeds."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with its own seed; they share the cores")
    parser.add_argument(
        "--collect", action="store_true", help="make tables and plots of the finished seeds, train nothing"
    )
    parser.add_argument("--fresh", action="store_true", help="delete the finished measurements of these seeds first")
    parser.add_argument(
        "--output_dir", help="folder of checkpoints, stores and partial results (default: below outputs/)"
    )


def add_task_options(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """Adds the options of runs on the tasks of `benchmarks/headline`; each measurement has a file of its own."""
    parser.add_argument("--minilm", help="folder with MiniLM's files (default: that of its package)")
    parser.add_argument("--rows", type=int, help="training samples (default: 2,020 images, 4,000 texts)")
    parser.add_argument("--test_rows", type=int, help="test samples (default: all)")
    parser.add_argument("--batch_size", type=int, default=batch_size)
    parser.add_argument("--gpu", action="store_true", help="use the GPU; results go to gpu/")
    parser.add_argument("--seconds", type=float, default=1e9, help="nothing begins later than this")
    parser.add_argument("--collect", action="store_true", help="make tables and plots of what is finished")
    parser.add_argument("--output_dir", help="folder of stores and of single results (default: below outputs/)")


def settle_run_options(options: argparse.Namespace, name: str, processes: int) -> None:
    """Fills in the folder of partial results and the threads of each process."""
    if options.output_dir is None:
        folder = f"{name}-smoke" if options.smoke else name
        options.output_dir = str(REPOSITORY / "outputs" / "benchmarks" / folder / "partial")
    if options.threads is None:
        options.threads = max(1, min(available_cores(), torch.get_num_threads()) // processes)


def partial_file(folder: str | Path, name: str, seed: int) -> Path:
    """The file with the measurements of an experiment with a seed."""
    return Path(folder) / f"{name}-seed-{seed}.json"


def read_measurements(folder: str | Path, name: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Finished measurements by arm.

    Raises:
        SystemExit: if they were made with other settings.
    """
    path = partial_file(folder, name, seed)
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    if content["settings"] != json.loads(json.dumps(settings)):
        raise SystemExit(f"{path.name} was made with other settings: begin anew with --fresh.")
    return content["done"]


def write_measurements(
    folder: str | Path, name: str, seed: int, settings: dict[str, Any], measurements: dict[str, Any]
) -> None:
    """Saves the finished measurements of an experiment with a seed."""
    write_json(partial_file(folder, name, seed), {"settings": settings, "done": measurements})


def run_experiments(
    options: argparse.Namespace,
    experiments: Mapping[str, Callable[[int, argparse.Namespace], None]],
    collect: Callable[[argparse.Namespace], None],
) -> None:
    """Runs every experiment with every seed and collects the results, as the options of a long run say.

    Args:
        options: those of `add_run_options`.
        experiments: name -> what measures it with a seed and saves that.
        collect: makes tables and result files of what is finished.
    """
    if options.fresh:
        for name in experiments:
            for seed in options.seeds:
                partial_file(options.output_dir, name, seed).unlink(missing_ok=True)
    if not options.collect:
        tasks = [(measure, seed, options) for measure in experiments.values() for seed in options.seeds]
        run_tasks(tasks, options.jobs)
    collect(options)


def run_tasks(tasks: Iterable[tuple[Any, ...]], jobs: int) -> None:
    """Calls `function(*arguments)` for every task `(function, *arguments)`, in this process or in several."""
    if jobs == 1:
        for function, *arguments in tasks:
            function(*arguments)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for run in [pool.submit(*task) for task in tasks]:
            run.result()
