"""The first measurements on a GPU: training steps, a profile of replay, equal losses, and a whole short training.

python -m benchmarks.gpu.run
"""

from __future__ import annotations

import argparse
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Deterministic algorithms ask for it before the first product; on Hopper it is the size that torch takes anyway.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from .._common import Claim, describe_machine, make_parser, pick, prepare, result_folder, write_json
from .comparisons import compare
from .profiling import profile_sides
from .trainings import check_equality, compare_trainings
from .workload import Setting, describe_card, use_gpu

#: Of a replay step relative to a step on features in GPU memory.
LIMIT = 1.05
#: Of a replay step: GPU memory relative to plain training at the deepest cut, and the share that waits for data.
MEMORY_LIMIT, WAIT_LIMIT = 0.30, 0.05
#: Fractions of the blocks behind the stem that are frozen where a model is measured at large batches.
DEPTHS = (1 / 3, 2 / 3, 5 / 6)
PREFLIGHT = "preflight"
SPEED = ("plain", "freeze_only", "replay", "replay_resident", "memory_gpu")
#: At the deepest cut of large batches; plain training is the same at the others.
DEEPEST = ("plain", "plain_gpu", "freeze_only", "replay", "replay_resident", "memory_gpu")
COMPILED = ("plain", "freeze_only", "replay")
MODELS = ("vit-base", "resnet-50", "deit-tiny")
#: Compiled after the uncompiled large batches; the other models and cuts come last, if there is time.
COMPILED_FIRST = (("vit-base", DEPTHS[1]), ("resnet-50", DEPTHS[1]))
ALL = ("plain", "freeze_only", "replay", "replay_resident", "replay_workers", "memory_gpu", "memory_host")
AGAINST_MEMORY = ("replay", "memory_gpu")
JPEG = ("plain_jpeg", "freeze_only_jpeg")
EQUALITY = ("replay_against_freeze_only", "freeze_only_against_itself")
PROFILED = ("replay", "replay_workers", "memory_gpu")
TRAININGS = ("plain", "auto", "always", "never")


@dataclass(frozen=True)
class Task:
    """A part of the run.

    Args:
        name: of its result.
        needs: seconds that must be left for it to start; it should take no longer.
        run: takes the seconds left of it and a function that publishes its result so far.
    """

    name: str
    needs: float
    run: Callable[[Callable[[], float], Callable[[dict[str, Any]], None]], None]


class Results:
    """The result file, written again after every measurement.

    Args:
        options: of the run.
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.folder = Path(options.output) if options.output else result_folder("gpu", options.smoke)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.start = time.perf_counter()
        self.machine = {**describe_machine(), **describe_card()}
        self.tasks: dict[str, dict[str, Any]] = {}

    def seconds_left(self) -> float:
        return self.options.seconds - (time.perf_counter() - self.start)

    def note(self, name: str, **facts: Any) -> None:
        """Adds facts to a task's entry and writes the file."""
        self.tasks.setdefault(name, {}).update(facts)
        content = {
            "benchmark": "gpu",
            "smoke": self.options.smoke,
            "claims": [{**asdict(claim), "holds": claim.holds} for claim in self.claims()],
            "settings": pick(self.options, "seed steps warmup rounds rows workers epochs seconds only"),
            "machine": self.machine,
            "seconds": time.perf_counter() - self.start,
            "results": self.tasks,
        }
        write_json(self.folder / "result.json", content)

    def claims(self) -> list[Claim]:
        """Of every comparison: replay against features in GPU memory; at large batches memory and waiting, too."""
        return [
            claim
            for name, entry in self.tasks.items()
            if name != PREFLIGHT
            for claim in claims_of(name, entry.get("result", {}))
        ]

    def run(self, task: Task) -> bool:
        """Runs a task if there is time; whether it did not fail."""
        if self.seconds_left() < task.needs:
            self.note(task.name, status=f"skipped: {self.seconds_left():.0f} s left, {task.needs:.0f} s needed")
            print(f"{task.name}: {self.tasks[task.name]['status']}", flush=True)
            return True
        begun = time.perf_counter()
        self.note(task.name, status="running", began_at=begun - self.start)

        def left() -> float:
            return min(self.seconds_left(), task.needs - (time.perf_counter() - begun))

        try:
            task.run(left, lambda result: self.note(task.name, result=result))
        except Exception:  # the tasks after it still measure; the run ends with an error
            self.note(task.name, status="failed", error=traceback.format_exc())
            print(f"{task.name}: FAILED\n{self.tasks[task.name]['error']}", flush=True)
            return False
        self.note(task.name, status="done", seconds=time.perf_counter() - begun)
        print(f"{task.name}: {time.perf_counter() - begun:.1f} s; {short(self.tasks[task.name])}", flush=True)
        return True


def claims_of(name: str, result: dict[str, Any]) -> list[Claim]:
    """The limits of one comparison, as far as it was measured."""
    sides, ratio = result.get("sides", {}), result.get("ratios", {}).get("replay / memory_gpu")
    found = (
        [] if ratio is None else [Claim(f"{name}: replay step / step on features in GPU memory", ratio, None, LIMIT)]
    )
    if result.get("fraction") == DEPTHS[-1] and use_gpu() and {"plain", "replay"} <= set(sides):
        memory = sides["replay"]["peak_gpu_bytes"] / sides["plain"]["peak_gpu_bytes"]
        found.append(Claim(f"{name}: peak memory, replay / plain", memory, None, MEMORY_LIMIT))
    if result.get("fraction") in DEPTHS and "replay" in sides:
        share = sides["replay"]["data_wait_share"]
        found.append(Claim(f"{name}: share of a replay step that waits for data", share, None, WAIT_LIMIT))
    return found


def short(entry: dict[str, Any]) -> str:
    """A task's result in a line."""
    result = entry.get("result", {})
    words = [
        f"{side} {1e3 * value['step_seconds']['median']:.2f} ms, {value['peak_gpu_bytes'] / 2**20:.0f} MiB"
        for side, value in result.get("sides", {}).items()
    ]
    words += [f"{name} {ratio:.3f}" for name, ratio in result.get("ratios", {}).items()]
    parts = result.get("replay_parts", {})
    words += [f"{part} {1e3 * value:.2f} ms" for part, value in parts.items() if part.endswith("_seconds")]
    if "build" in result:
        words.append(f"build {result['build']['seconds']:.2f} s, {result['build']['rows_per_second'] or 0:.0f} rows/s")
    words += [f"{name} {result[name]}" for name in EQUALITY if name in result]
    for arm, value in result.get("arms", {}).items():
        words.append(f"{arm} {value['seconds']:.1f} s, accuracy {value['accuracy']:.3f}")
    for side, value in result.items():
        if isinstance(value, dict) and "gpu_busy_share" in value:
            words.append(
                f"{side} {1e3 * value['step_seconds']:.2f} ms, GPU busy {100 * value['gpu_busy_share']:.0f} %"
            )
    return "; ".join(words)


def comparison(options: argparse.Namespace, needs: float, setting: Setting, sides: tuple[str, ...]) -> Task:
    kind = "_jpeg" if any("jpeg" in side for side in sides) else ""
    name = f"{setting.model}{kind}_{round(100 * setting.fraction)}_{setting.codec}_batch{setting.batch_size}"
    name += "_compiled" if setting.compiled else ""
    return Task(name, needs, lambda left, publish: compare(setting, sides, options, left, publish))


def preflight(options: argparse.Namespace) -> Task:
    """Tiny models through every kind of training: what does not run at all shows in seconds."""
    tiny = argparse.Namespace(**{**vars(options), "smoke": True, "rounds": 1, "steps": 6, "warmup": 2, "rows": 48})

    def run(left: Callable[[], float], publish: Callable[[dict[str, Any]], None]) -> None:
        for model, sides in (("vit-base", (*ALL, *JPEG)), ("resnet-50", AGAINST_MEMORY)):
            compare(Setting(model, 8, 0.5), sides, tiny, left, publish)

    return Task(PREFLIGHT, 0, run)


def make_tasks(options: argparse.Namespace, folder: Path) -> list[Task]:
    """The tasks, the most important first.

    Args:
        options: of the run.
        folder: of the profile's tables.
    """
    batch, large, largest = (8, 16, 16) if options.smoke else (64, 128, 256)
    task = partial(comparison, options)
    equality = [
        ("vit-base", True, "deterministic"),
        ("vit-base", True, "any"),
        ("vit-base", False, "deterministic"),
        ("resnet-50", True, "deterministic_where_possible"),
    ]
    profiled = Setting("vit-base", batch, 0.75)
    return [
        *(task(55, Setting(name, largest, DEPTHS[-1]), DEEPEST) for name in MODELS),
        *(
            task(25, Setting(name, largest, fraction), ("freeze_only", *AGAINST_MEMORY))
            for name in MODELS
            for fraction in reversed(DEPTHS[:-1])
        ),
        *(task(60, Setting(name, largest, depth, compiled=True), COMPILED) for name, depth in COMPILED_FIRST),
        task(70, Setting("vit-base", batch, 0.75), ALL),
        task(35, Setting("vit-base", batch, 11 / 12), (*AGAINST_MEMORY, "freeze_only")),
        task(35, Setting("vit-base", batch, 0.5), (*AGAINST_MEMORY, "freeze_only")),
        Task("profile", 35, lambda _, publish: profile_sides(profiled, PROFILED, options, folder, publish)),
        task(40, Setting("vit-base", batch, 0.75), JPEG),
        task(40, Setting("resnet-50", batch, 0.75), SPEED),
        task(35, Setting("deit-tiny", batch, 0.75), SPEED),
        *(
            Task(
                f"equality_{model}_{'bf16' if bf16 else 'fp32'}_{algorithms}",
                15,
                lambda _, publish, case=(model, bf16, algorithms): check_equality(*case, options, publish),
            )
            for model, bf16, algorithms in equality
        ),
        Task("training", 180, lambda left, publish: compare_trainings("vit-base", TRAININGS, options, left, publish)),
        task(25, Setting("vit-base", batch, 0.75, "int8"), AGAINST_MEMORY),
        task(30, Setting("vit-base", batch, 0.75, "fp16"), AGAINST_MEMORY),
        task(40, Setting("vit-base", large, 0.75), SPEED),
        *(
            task(25, Setting(name, batch, fraction), AGAINST_MEMORY)
            for name in ("resnet-50", "deit-tiny")
            for fraction in (0.5, 11 / 12)
        ),
        task(30, Setting("vit-base", large, 11 / 12), AGAINST_MEMORY),
        task(35, Setting("resnet-50", large, 0.75), SPEED),
        task(30, Setting("deit-tiny", large, 0.75), SPEED),
        *(
            task(25, Setting(name, batch, 0.75, codec), AGAINST_MEMORY)
            for name in ("resnet-50", "deit-tiny")
            for codec in ("int8", "fp16")
        ),
        *(
            task(60, Setting(name, largest, depth, compiled=True), COMPILED)
            for name in MODELS
            for depth in DEPTHS
            if (name, depth) not in COMPILED_FIRST
        ),
    ]


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--output", help="folder of the results (default: this benchmark's)")
    parser.add_argument(
        "--seconds", type=float, default=450.0, help="no task starts that needs more than what is left"
    )
    parser.add_argument("--only", nargs="+", help="run tasks whose names begin so")
    parser.add_argument("--steps", type=int, default=40, help="steps of a block")
    parser.add_argument("--warmup", type=int, default=10, help="steps of a block before those that are timed")
    parser.add_argument("--rounds", type=int, default=3, help="timed blocks of each side")
    parser.add_argument("--rows", type=int, default=2560, help="rows of a data set, at least")
    parser.add_argument("--workers", type=int, default=12, help="loader processes of the sides that decode JPEG files")
    parser.add_argument("--epochs", type=int, default=16, help="of the whole training")
    options = parser.parse_args(argv)
    if options.smoke:
        small = {"steps": 6, "warmup": 2, "rounds": 1, "rows": 48, "workers": 1, "epochs": 4}
        vars(options).update(small)
    return options


def main(argv: list[str] | None = None) -> int:
    """Runs the tasks; 1 if one failed, 3 if nothing runs at all."""
    options = parse_options(argv)
    prepare(options)
    results = Results(options)
    print(f"{results.machine['card']}, torch {results.machine['torch']}", flush=True)
    if use_gpu() and not results.run(preflight(options)):
        print("The tiny models of the preflight do not run: nothing else is tried.")
        return 3
    tasks = make_tasks(options, results.folder)
    if options.only:
        tasks = [task for task in tasks if task.name.startswith(tuple(options.only))]
    succeeded = [results.run(task) for task in tasks]
    for claim in results.claims():
        print(claim)
    print(f"wrote {results.folder / 'result.json'} after {time.perf_counter() - results.start:.0f} s")
    return 0 if all(succeeded) else 1


if __name__ == "__main__":
    raise SystemExit(main())
