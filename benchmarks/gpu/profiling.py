"""Where the time of a replay step goes: torch's profiler over some steps, as a table and as numbers."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import accelerate.data_loader
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import Trainer, TrainerCallback

from hf_freezecache.cache.store import FeatureStore
from hf_freezecache.replay.collator import ReplayCollator
from hf_freezecache.training import epoch_source

from .._common import describe_machine
from .workload import Bench, Setting, describe_card, device, synchronize, use_gpu

WINDOW = "profiled steps"
#: What gets a label in the trace: (owner, name, label). Labels nest: a training step contains the decode.
LABELLED = [
    (FeatureStore, "read_rows", "read rows"),
    (ReplayCollator, "__call__", "collate"),
    (accelerate.data_loader, "send_to_device", "host to device"),
    (epoch_source, "replay_features", "decode"),
    (Trainer, "training_step", "training step"),
    (Trainer, "compute_loss", "forward"),
    (accelerate.Accelerator, "backward", "backward"),
    (accelerate.Accelerator, "clip_grad_norm_", "clip gradients"),
]
#: Labels of torch itself begin so.
_OWN_LABELS = ("enumerate(DataLoader)", "Optimizer.step", "Optimizer.zero_grad")
_GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


class Profiler(TrainerCallback):
    """Profiles some steps in the middle of a training.

    Args:
        first: the first step that is profiled, from 0.
        steps: how many.
    """

    def __init__(self, first: int, steps: int):
        self.first, self.steps = first, steps
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if use_gpu() else [])]
        with profile(activities=activities):  # what the first one sets up takes long
            torch.ones(1, device=device()).add_(1)
        self.profile = profile(activities=activities)
        self._window = record_function(WINDOW)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.first:
            synchronize()
            self.profile.start()
            self._window.__enter__()
        elif state.global_step == self.first + self.steps:
            synchronize()
            self._window.__exit__(None, None, None)
            self.profile.stop()


@contextlib.contextmanager
def labelled() -> Iterator[None]:
    """Inside, the functions in `LABELLED` leave a range with their label in a trace."""
    with contextlib.ExitStack() as stack:
        for owner, name, label in LABELLED:
            stack.enter_context(mock.patch.object(owner, name, _with_label(getattr(owner, name), label)))
        yield


def _with_label(function: Callable, label: str) -> Callable:
    def call(*args, **kwargs):
        with record_function(label):
            return function(*args, **kwargs)

    return call


def profile_sides(
    setting: Setting,
    sides: tuple[str, ...],
    options: argparse.Namespace,
    output: Path,
    publish: Callable[[dict[str, Any]], None],
) -> None:
    """Profiles a block of steps of every side; writes `profile_<side>.txt`, and the trace of the first side.

    Args:
        setting: model, batch, cut and codec.
        sides: names of sides, see `Bench.sides`.
        options: steps, warm-up, rows, workers and seed.
        output: folder of the tables and the trace.
        publish: takes the result so far: numbers of a step by side, see `summarize`.
    """
    steps = min(8, options.steps - options.warmup - 1)
    result: dict[str, Any] = {"setting": vars(setting), "profiled_steps": steps}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(setting, options, Path(folder))
        bench.run_block("replay")
        for side in sides:
            profiler = Profiler(options.warmup, steps)
            with labelled():
                trainer = bench.sides()[side]([profiler])
                trainer.train()
            trace = Path(folder) / "trace.json"
            profiler.profile.export_chrome_trace(str(trace))
            result[side] = summarize(json.loads(trace.read_text())["traceEvents"], steps)
            about = json.dumps({**describe_machine(), **describe_card(), "seed": options.seed})
            head = f"{side}, {vars(setting)}, cut {bench.cut}\n{about}\n"
            numbers = json.dumps(result[side], indent=1)
            (output / f"profile_{side}.txt").write_text(f"{head}{numbers}\n{tables(profiler.profile)}")
            if side == sides[0]:
                with trace.open("rb") as source, gzip.open(output / f"trace_{side}.json.gz", "wb") as target:
                    shutil.copyfileobj(source, target)
            publish(result)


def tables(profiled: profile) -> str:
    """The operations that take longest on the GPU and on the CPU."""
    averages = profiled.key_averages()
    orders = ["self_cpu_time_total", "cpu_time_total"]
    orders = ["self_cuda_time_total", *orders] if use_gpu() else orders
    return "\n\n".join(f"by {order}\n{averages.table(sort_by=order, row_limit=30)}" for order in orders)


def summarize(events: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Numbers of a step from a trace.

    Args:
        events: of a Chrome trace, times in microseconds.
        steps: steps in the window.

    Returns:
        `step_seconds` while profiled (slower than without), `gpu_busy_share` of the window in which a kernel or a
        copy ran, `cpu_seconds` of the main thread and `gpu_span_seconds` by label, seconds of copies by direction,
        seconds in which the CPU waited for the GPU, kernels and launches, and the longest kernels; all per step.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    window = next(event for event in complete if event["name"] == WINDOW and event.get("cat") == "user_annotation")
    start, end = window["ts"], window["ts"] + window["dur"]
    inside = [event for event in complete if start <= event["ts"] <= end]
    work = [event for event in inside if event.get("cat") in _GPU_WORK]
    kernels = [event for event in work if event["cat"] == "kernel"]
    runtime = [event for event in inside if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    names = {label for _, _, label in LABELLED}
    labels = [event for event in inside if event["name"] in names or event["name"].startswith(_OWN_LABELS)]
    on_cpu = [event for event in labels if event.get("cat") == "user_annotation"]
    on_gpu = [event for event in labels if event.get("cat") == "gpu_user_annotation"]
    copies = [event for event in work if event["cat"] == "gpu_memcpy"]
    waits = [event for event in runtime if "Synchronize" in event["name"]]
    launches = [event for event in runtime if "Launch" in event["name"]]
    return {
        "step_seconds": window["dur"] / 1e6 / steps,
        "gpu_busy_share": union([(event["ts"], event["ts"] + event["dur"]) for event in work]) / window["dur"],
        "cpu_seconds": _by_name(on_cpu, steps),
        "gpu_span_seconds": _by_name(on_gpu, steps),
        "gpu_copy_seconds": _by_name(copies, steps),
        "cpu_waits_for_gpu_seconds": _by_name(waits, steps),
        "kernels": len(kernels) / steps,
        "launches": len(launches) / steps,
        "launch_seconds": sum(event["dur"] for event in launches) / 1e6 / steps,
        "longest_kernels_seconds": dict(list(_by_name(kernels, steps).items())[:25]),
    }


def union(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _by_name(events: list[dict[str, Any]], steps: int) -> dict[str, float]:
    """Seconds of a step by name, the longest first."""
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        seconds[event["name"][:120]] += event["dur"] / 1e6 / steps
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))
