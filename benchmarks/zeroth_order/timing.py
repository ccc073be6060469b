"""Seconds of a step by method, on features and on samples; the generator's share of them; memory beside inference.

python -m benchmarks.zeroth_order.timing --threads 1          # CPU seconds; continues after a kill
python -m benchmarks.zeroth_order.timing --gpu --collect      # the table of what is finished
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.data import Subset
from transformers import TrainerCallback, set_seed

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer, ZeroOrderConfig, ZeroOrderTrainer
from hf_freezecache.zeroth_order import mixin

from .._common import (
    Claim,
    describe_machine,
    in_turn,
    make_parser,
    pick,
    prepare,
    result_folder,
    silence,
    write_json,
    write_result,
)
from .._partials import add_task_options, settle_run_options
from .._statistics import markdown_table
from ..gpu.workload import describe_card
from ..headline.tasks import Task, load_task
from .jobs import Job
from .methods import EPS, METHODS, on_the_fly, pool
from .tables import MACHINE
from .trainings import PlainStochasticGradients, make_args, make_config

TASKS = ("caltech-224", "banking77")
MEZO, POOL, FLY, EXACT = "MeZO", pool(4095), on_the_fly(8), "exact gradient"
#: Method, and whether its steps run on features.
SIDES = {
    **{name: (name, True) for name in (MEZO, POOL, FLY, "naive uniform", "uniform, power of two", EXACT)},
    **{f"{name}, on samples": (name, False) for name in (MEZO, POOL, EXACT)},
}
#: Steps at the beginning of a training that are not timed.
WARM_UP = 3


class StepClock(TrainerCallback):
    """Seconds from the end of a step to the end of the next one, with the batch that is fetched in between.

    On a CPU they are those of this process alone, which other work on the same cores hardly changes; with a GPU they
    are those of a clock.
    """

    def __init__(self, on_gpu: bool):
        self._clock = time.perf_counter if on_gpu else time.process_time
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(self._clock())

    def seconds(self) -> list[float]:
        """Of the steps after the first ones."""
        pairs = zip(self.ends[WARM_UP - 1 :], self.ends[WARM_UP:], strict=False)
        return [later - earlier for earlier, later in pairs]


class Watched(ZeroOrderTrainer):
    """Measures the memory of all losses of a step and of one from the store, and the generator's share of the time."""

    def __init__(self, *args, on_gpu: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.on_gpu, self.found, self._seen = on_gpu, {}, 0

    def training_step(self, model, inputs, *args, **kwargs):
        step = super().training_step
        if self._captures is not None or not self.freeze_status().replaying:
            return step(model, inputs, *args, **kwargs)
        self._seen += 1
        losses: list[torch.Tensor] = []

        def run():
            losses.append(step(model, inputs, *args, **kwargs))

        if self._seen == 1:  # it makes what is kept of a pool
            self.found["step_bytes"] = peak_bytes(run, self)
            return losses[0]
        if self._seen == 2:
            with taking_one_loss():
                self.found["loss_bytes"] = peak_bytes(run, self)
            return losses[0]
        with self._naming_numbers(), profile(activities=activities(self.on_gpu)) as profiled, record_function("step"):
            loss = step(model, inputs, *args, **kwargs)
        spent = {
            event.key: event.cpu_time_total for event in profiled.key_averages() if event.key in ("step", "numbers")
        }
        self.found["generator_share"] = spent.get("numbers", 0.0) / spent["step"]
        return loss

    @contextmanager
    def _naming_numbers(self):
        """Inside, the profiler sees when numbers are made, under a name."""
        numbers = self._own_optimizer.perturbation.numbers
        take = numbers.take_each

        def named(*args):
            with record_function("numbers"):
                found = take(*args)
                if self.on_gpu:
                    torch.cuda.synchronize()
                return found

        numbers.take_each = named
        try:
            yield
        finally:
            del numbers.take_each


@contextmanager
def taking_one_loss():
    """Inside, a step runs the live blocks on its features once and moves no weight: inference."""
    look_around = mixin.look_around

    def look_once(displacement, directions, eps, estimator, run):
        return [run()] * (2 * len(directions))

    mixin.look_around = look_once
    try:
        yield
    finally:
        mixin.look_around = look_around


def activities(on_gpu: bool) -> list[ProfilerActivity]:
    """What the profiler looks at."""
    return [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]


def peak_bytes(run: Any, trainer: Watched) -> int:
    """The most memory that tensors take at a time, beyond what there is before."""
    if trainer.on_gpu:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def make_trainer(side: str, task: Task, options: argparse.Namespace, steps: int, watch: bool = False) -> Any:
    """The trainer of a side."""
    name, on_features = SIDES[side]
    target = Path(options.output_dir) / "timings"
    shutil.rmtree(target, ignore_errors=True)
    set_seed(options.seed)
    job = Job(task.name, "new head", name, 1e-5, EPS, options.seed, False)
    config = make_config(task, options)
    if not on_features:
        config = FreezeCacheConfig(policy="manual", freeze_points=config.freeze_points, cache="never", report="none")
    kwargs: dict[str, Any] = {
        "args": make_args(job, task, target, options, steps),
        "train_dataset": task.train,
        "data_collator": task.collator,
        "freeze_cache": config,
    }
    settings = METHODS[name].settings
    if settings is None:
        return PlainStochasticGradients(task.load_model(), **kwargs)
    kwargs["zero_order"] = ZeroOrderConfig(eps=EPS, **settings)
    if watch:
        return Watched(task.load_model(), **kwargs, on_gpu=options.gpu)
    return ZeroOrderTrainer(task.load_model(), **kwargs)


def time_side(side: str, task: Task, options: argparse.Namespace) -> float:
    """The median seconds of a step."""
    trainer: FreezeCacheTrainer = make_trainer(side, task, options, options.steps + WARM_UP)
    clock = StepClock(options.gpu)
    trainer.add_callback(clock)
    silence(trainer).train()
    return statistics.median(clock.seconds())


def watch_sides(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """Memory and the generator's share, by side; all steps have the samples of one batch."""
    found = {}
    task = replace(task, train=Subset(task.train, range(task.batch_size)))
    for side, (name, on_features) in SIDES.items():
        if on_features and METHODS[name].settings is not None:
            trainer = make_trainer(side, task, options, steps=3, watch=True)
            silence(trainer).train()
            found[side] = trainer.found
    return found


def machine_file(options: argparse.Namespace) -> Path:
    """Where it is said what the machine was."""
    return round_file(options, "", 0).parent / MACHINE


def round_file(options: argparse.Namespace, task: str, number: int | str) -> Path:
    """Where a round leaves its result."""
    return Path(options.output_dir) / ("timing-gpu" if options.gpu else "timing-cpu") / task / f"{number}.json"


def run_task(name: str, options: argparse.Namespace) -> None:
    """All rounds of a task that are not there yet."""
    wanted = ["watched", *range(options.rounds)]
    wanted = [number for number in wanted if not round_file(options, name, number).exists()]
    if not wanted:
        return
    task, deadline = load_task(name, options), time.time() + options.seconds
    for number in wanted:
        if time.time() > deadline:
            return
        if number == "watched":
            result = watch_sides(task, options)
        else:
            result = {side: time_side(side, task, options) for side in in_turn(SIDES, number)}
        write_json(round_file(options, name, number), result)
        print(f"{name}, {number}: {result}", flush=True)


def collect(options: argparse.Namespace) -> None:
    """Writes the table and the JSON of what is finished."""
    claims, lines, content = [], [], {}
    for name in options.tasks:
        files = [round_file(options, name, number) for number in range(options.rounds)]
        rounds = [json.loads(path.read_text()) for path in files if path.exists()]
        watched_file = round_file(options, name, "watched")
        watched = json.loads(watched_file.read_text()) if watched_file.exists() else {}
        if not rounds:
            continue
        content[name] = {"rounds": rounds, "watched": watched}
        for side in SIDES:
            lines.append(_line(name, side, rounds, watched.get(side, {})))
        for side in (POOL, FLY):
            ratio = statistics.median(each[side] / each[MEZO] for each in rounds)
            claims.append(Claim(f"{name}: seconds of a step of '{side}' over MeZO's", ratio, at_most=1.0))
        for side, found in watched.items():
            ratio = found["step_bytes"] / found["loss_bytes"]
            claims.append(Claim(f"{name}, '{side}': memory of a step over inference", ratio, at_most=1.1))
    if not content:
        print("nothing is finished.")
        return
    header = "task | step | median, ms (min to max) | over MeZO's | numbers, share of a step | memory over inference"
    table = "\n".join(markdown_table(header, lines)) + "\n"
    print(table)
    place = "gpu" if options.gpu else "cpu"
    folder = result_folder("zeroth_order", options.smoke) / place
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "timing.md").write_text(table)
    machine = machine_file(options)
    content["measured_on"] = json.loads(machine.read_text()) if machine.exists() else None
    settings = pick(options, "batch_size steps rounds threads gpu")
    write_result("zeroth_order", options, settings, content, claims, f"{place}/timing.json")


def _line(task: str, side: str, rounds: list[dict[str, float]], found: dict[str, float]) -> tuple[str, ...]:
    own = [1e3 * each[side] for each in rounds]
    ratios = [each[side] / each[MEZO] for each in rounds]
    return (
        task,
        side,
        f"{statistics.median(own):.2f} ({min(own):.2f} to {max(own):.2f})",
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        f"{100 * found['generator_share']:.1f} %" if found else "",
        f"{found['step_bytes'] / found['loss_bytes']:.3f}" if found else "",
    )


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_task_options(parser, 16)
    parser.set_defaults(test_rows=32)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a training")
    parser.add_argument("--rounds", type=int, default=5, help="trainings of every side")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    options = parser.parse_args(argv)
    if options.smoke:
        options.rows, options.steps, options.rounds = 32, 2, 2
    settle_run_options(options, "zeroth_order", 1)
    return options


def main() -> None:
    options = parse_options()
    prepare(options)
    if not options.collect:
        machine = describe_machine() | (describe_card() if options.gpu else {})
        write_json(machine_file(options), machine)
        for name in options.tasks:
            run_task(name, options)
    collect(options)


if __name__ == "__main__":
    main()
