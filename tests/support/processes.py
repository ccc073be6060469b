"""Processes of their own, forked from an interpreter that has imported the large packages and done nothing else.

A new interpreter imports them for seconds; a fork of one that has them starts at once. That interpreter is started by
the first call, knows nothing of the tests' memory, and hashes strings by another seed than they.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_CONTEXT = multiprocessing.get_context("forkserver")
#: Of the interpreter that is forked. `multiprocessing` does not give it the path of this one.
_SETTINGS = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))), "PYTHONHASHSEED": "12"}


@dataclass(frozen=True)
class Finished:
    """A process that has ended.

    Args:
        returncode: 0 if nothing failed.
        stdout: what it has printed.
        stderr: its errors and log.
    """

    returncode: int
    stdout: str
    stderr: str


def warm_context() -> Any:
    """The `multiprocessing` context whose processes are forked from that interpreter."""
    before = dict(os.environ)
    os.environ.update(_SETTINGS)
    try:
        _CONTEXT.set_forkserver_preload(["support.preloaded"])
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return _CONTEXT


def run_script(script: Path, arguments: Sequence[object], folder: Path) -> Finished:
    """Runs a Python file as `python script arguments` would; see `run_together`."""
    return run_together(run_as_main, [(script, arguments)], folder)[0]


def run_code(code: str, folder: Path) -> Finished:
    """Runs code as `python -c code` would; see `run_together`."""
    return run_together(exec, [(code, {"__name__": "__main__"})], folder)[0]


def run_as_main(script: Path, arguments: Sequence[object]) -> None:
    """Runs a Python file in this process as `python script arguments` would."""
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *map(str, arguments)]
    runpy.run_path(str(script), run_name="__main__")


def run_together(
    target: Callable[..., Any],
    arguments: Sequence[tuple],
    folder: Path,
    environments: Sequence[Mapping[str, str]] = ({},),
    timeout: float = 240,
    kills: bool = True,
) -> list[Finished]:
    """Runs a function in several processes at the same time.

    Args:
        target: the function, importable by its name.
        arguments: of each process.
        folder: gets files of what the processes print.
        environments: what the environment of each has beside that of this process.
        timeout: seconds after which all are killed.
        kills: whether the others are killed when one fails.
    """
    context, started = warm_context(), []
    for number, (given, more) in enumerate(zip(arguments, environments, strict=True)):
        files = [folder / f"{name}-{number}.txt" for name in ("stdout", "stderr")]
        process = context.Process(target=_run, args=(target, given, files, {**os.environ, **more}))
        process.start()
        started.append((process, files))
    _wait_for([process for process, _ in started], timeout, kills)
    return [Finished(process.exitcode, *(file.read_text() for file in files)) for process, files in started]


def _wait_for(processes: Sequence[Any], timeout: float, kills: bool) -> None:
    deadline, running = time.monotonic() + timeout, list(processes)
    while running:
        wait([process.sentinel for process in running], timeout=max(0.0, deadline - time.monotonic()))
        ended = [process for process in running if process.exitcode is not None]
        if (kills and any(process.exitcode for process in ended)) or not ended:
            break
        running = [process for process in running if process not in ended]
    for process in running:
        process.kill()
        process.join()


def _run(target: Callable[..., Any], arguments: tuple, files: Sequence[Path], environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for file, number in zip(files, (1, 2), strict=True):
        with open(file, "wb") as opened:
            os.dup2(opened.fileno(), number)
    target(*arguments)
