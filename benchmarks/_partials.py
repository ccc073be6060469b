"""Measurements of a long run, seed by seed, so that a killed run goes on where it was."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from ._common import write_json


def partial_file(folder: str | Path, name: str, seed: int) -> Path:
    """Where the measurements of an experiment with a seed lie."""
    return Path(folder) / f"{name}-seed-{seed}.json"


def read_done(folder: str | Path, name: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
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


def write_done(folder: str | Path, name: str, seed: int, settings: dict[str, Any], done: dict[str, Any]) -> None:
    """Keeps the finished measurements of an experiment with a seed."""
    write_json(partial_file(folder, name, seed), {"settings": settings, "done": done})


def run_tasks(function: Callable[..., None], tasks: Iterable[tuple], jobs: int) -> None:
    """Calls `function(*task)` for every task, in this process or in several."""
    if jobs == 1:
        for task in tasks:
            function(*task)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for run in [pool.submit(function, *task) for task in tasks]:
            run.result()
