"""Real process groups (gloo, CPU)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "distributed" / "script_train.py"
ROOT = Path(__file__).parents[2]


def launch(arguments: Sequence[object], processes: int = 2, timeout: float = 240, fails: bool = False) -> str:
    """Runs `script_train.py` in several processes, which end well unless it `fails`; returns what they have printed."""
    # `--multi_gpu` is what starts several processes, on a machine without accelerators too (gloo then).
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    command += ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--num_cpu_threads_per_process", "1", "--main_process_port", "0", str(SCRIPT), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert bool(done.returncode) == fails, done.stdout[-2000:] + done.stderr[-20000:]
    return done.stdout + done.stderr


def seen_by(output: Path) -> list[dict]:
    """What every process of `script_train.py` has written, by rank."""
    return [json.loads(path.read_text()) for path in sorted(output.glob("rank-*.json"))]
