"""What the benchmarks share: options, the machine in words, interleaved timing, claims and result files."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PrinterCallback, Trainer, set_seed
from transformers.utils import logging

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_VARIABLE = "FREEZECACHE_SHARED"
#: Of `TrainingArguments`: nothing is printed, moved or written; callbacks ask for evaluations and checkpoints.
QUIET = {
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_strategy": "no",
    "remove_unused_columns": False,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "report_to": "none",
    "use_cpu": True,
}
_PACKAGES = ("torch", "transformers", "datasets", "pyarrow", "accelerate", "numpy", "safetensors")


# Options


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="use tiny settings and write the result below outputs/")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shared", help=f"folder with data/ and weights/ (${SHARED_VARIABLE}, or ../shared)")
    return parser


def prepare(options: argparse.Namespace) -> None:
    """Threads, seed and quiet libraries."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    set_seed(options.seed)
    quiet()


def quiet() -> None:
    """No progress bars and only errors from the libraries: printing costs time too."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def silence(trainer: Trainer) -> Trainer:
    """Removes the callback that prints every log entry where there is no progress bar."""
    trainer.remove_callback(PrinterCallback)
    return trainer


def pick(options: argparse.Namespace, names: str) -> dict[str, Any]:
    """Options by their names, which are separated by spaces: the settings of a result."""
    return {name: getattr(options, name) for name in names.split()}


def shared_folder(options: argparse.Namespace, *parts: str) -> Path:
    """A file or folder in the shared folder.

    Raises:
        SystemExit: if it is absent; the message says how to name another place.
    """
    root = Path(options.shared or os.environ.get(SHARED_VARIABLE) or REPOSITORY.parent / "shared")
    path = root.joinpath(*parts)
    if not path.exists():
        raise SystemExit(
            f"{'/'.join(parts)} is not in {root}: name the folder that holds data/ and weights/ with --shared or "
            f"${SHARED_VARIABLE}."
        )
    return path


# Results


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, threads, load and versions; nothing that names the machine."""
    pages, page_size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _cpu_model(),
        "cores": available_cores(),
        "memory_gb": round(pages * page_size / 1e9, 1),
        "torch_threads": torch.get_num_threads(),
        "load_average_at_start": round(_LOAD_AT_START, 2),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# Another process on the same cores shows here; the benchmark itself would after a while.
_LOAD_AT_START = os.getloadavg()[0]


def result_folder(name: str, smoke: bool) -> Path:
    """Where a benchmark's results go: its own folder, or `outputs/` for a smoke run."""
    folder = REPOSITORY / "outputs" / "benchmarks" / f"{name}-smoke" if smoke else REPOSITORY / "benchmarks" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_result(
    name: str,
    options: argparse.Namespace,
    settings: Mapping[str, Any],
    results: Any,
    claims: list[Claim],
    file: str = "result.json",
) -> Path:
    """Writes a result file and prints the claims.

    Args:
        name: the benchmark's folder.
        options: `smoke` and `seed` are noted.
        settings: what was measured with, as JSON values.
        results: what was measured.
        claims: what must hold, and whether it does.
        file: its name.
    """
    content = {
        "benchmark": name,
        "smoke": options.smoke,
        "claims": [{**asdict(claim), "holds": claim.holds} for claim in claims],
        "settings": {"seed": options.seed, **settings},
        "machine": describe_machine(),
        "results": results,
    }
    path = result_folder(name, options.smoke) / file
    write_json(path, content)
    for claim in claims:
        print(claim)
    print(f"wrote {path.relative_to(REPOSITORY)}")
    return path


def write_json(path: Path, content: Any) -> None:
    """Writes JSON aside and renames it: a killed run leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(_rounded(content), indent=1) + "\n")
    aside.replace(path)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value


@dataclass(frozen=True)
class Claim:
    """A number with the limit it must keep.

    Args:
        what: in words.
        value: as measured.
        at_least: lower limit, or None.
        at_most: upper limit, or None.
    """

    what: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def holds(self) -> bool:
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)

    def __str__(self) -> str:
        limit = f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"
        return f"{'holds' if self.holds else 'FAILS'}: {self.what}: {self.value:.4g} (limit {limit})"


# Timing


def interleave(sides: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Runs the sides in turn, A B, B A, A B, ..., and times every run.

    Args:
        sides: name -> what to run.
        repeats: timed runs of every side.
        warmup: runs of every side before, not timed.

    Returns:
        Seconds by side.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-warmup, repeats):
        for name in in_turn(sides, number):
            start = time.perf_counter()
            sides[name]()
            elapsed = time.perf_counter() - start
            if number >= 0:
                seconds[name].append(elapsed)
    return seconds


def in_turn(names: Iterable[str], number: int) -> list[str]:
    """The names in their order, backwards in every second round: a drift of the machine hits all alike."""
    return list(names)[:: 1 if number % 2 == 0 else -1]


def summary(values: list[float]) -> dict[str, Any]:
    """Median, quartiles, extremes and the number of values."""
    lower, median, upper = quartiles(values)
    return {
        "median": median,
        "lower_quartile": lower,
        "upper_quartile": upper,
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper
