"""The benchmark for GPUs runs on a CPU with tiny models, keeps its time and reads traces rightly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import profiling, run

ROOT = Path(__file__).parents[2]


def event(category: str, name: str, start: float, seconds: float) -> dict:
    return {"ph": "X", "cat": category, "name": name, "ts": 1e6 * start, "dur": 1e6 * seconds}


def test_a_trace_of_two_steps_becomes_seconds_of_one_step():
    events = [
        event("user_annotation", profiling.WINDOW, 10, 8),
        event("user_annotation", "decode", 11, 1),
        event("user_annotation", "decode", 15, 1),
        event("kernel", "matmul", 11, 2),
        event("kernel", "matmul", 12, 2),
        event("gpu_memcpy", "Memcpy HtoD", 15, 1),
        event("gpu_user_annotation", "decode", 11, 2),
        event("cuda_runtime", "cudaStreamSynchronize", 13, 1),
        event("cuda_runtime", "cudaLaunchKernel", 11, 0.5),
        event("kernel", "before the window", 1, 5),
    ]
    numbers = profiling.summarize(events, steps=2)
    assert numbers["step_seconds"] == 4
    assert numbers["gpu_busy_share"] == pytest.approx((3 + 1) / 8)
    assert numbers["cpu_seconds"] == {"decode": 1.0}
    assert numbers["gpu_span_seconds"] == {"decode": 1.0}
    assert numbers["gpu_copy_seconds"] == {"Memcpy HtoD": 0.5}
    assert numbers["cpu_waits_for_gpu_seconds"] == {"cudaStreamSynchronize": 0.5}
    assert numbers["longest_kernels_seconds"] == {"matmul": 2.0}
    assert (numbers["kernels"], numbers["launches"]) == (1.0, 0.5)


def read_tasks(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())["results"]


def test_a_task_without_time_is_skipped_and_one_that_fails_is_noted(tmp_path):
    options = run.parse_options(["--smoke", "--output", str(tmp_path), "--seconds", "5"])
    results = run.Results(options)

    def fail(left, publish):
        publish({"half": 1})
        raise RuntimeError("no kernel")

    assert results.run(run.Task("long", 60.0, fail))
    assert not results.run(run.Task("broken", 1.0, fail))
    assert results.run(run.Task("good", 1.0, lambda left, publish: publish({"ratios": {"replay / memory_gpu": 1.2}})))
    tasks = read_tasks(tmp_path)
    assert tasks["long"]["status"].startswith("skipped")
    assert tasks["broken"]["status"] == "failed" and "no kernel" in tasks["broken"]["error"]
    assert tasks["broken"]["result"] == {"half": 1}
    assert tasks["good"]["status"] == "done"
    assert results.run(
        run.Task(run.PREFLIGHT, 0.0, lambda left, publish: publish({"ratios": {"replay / memory_gpu": 9}}))
    )
    claims = json.loads((tmp_path / "result.json").read_text())["claims"]
    assert [claim["holds"] for claim in claims] == [False]


@pytest.mark.slow
def test_tiny_models_replay_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--smoke", "--output", str(tmp_path), "--only"]
    only = ["vit-base_92_int4_batch8", "equality_resnet-50"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *only], cwd=ROOT, env=environment, check=True)
    tasks = read_tasks(tmp_path)
    assert {entry["status"] for entry in tasks.values()} == {"done"}
    steps = tasks["vit-base_92_int4_batch8"]["result"]
    assert steps["cut"] == 5
    assert steps["sides"].keys() == {"replay", "memory_gpu", "freeze_only"}
    assert {side["single_step_seconds"]["n"] for side in steps["sides"].values()} == {3}
    assert steps["single_step_ratios"].keys() == steps["ratios"].keys()
    assert steps["replay_parts"]["code_bytes_per_batch"] > 0
    equality = tasks["equality_resnet-50_bf16_deterministic_where_possible"]["result"]
    assert equality["replayed"] and equality["replay_against_freeze_only"]["bit_equal"]
