"""Real process groups (gloo, CPU)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore

from support.processes import ROOT, Finished, run_as_main, run_together

SCRIPT = Path(__file__).parents[1] / "distributed" / "script_train.py"
_ON_CPU = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def launch(
    arguments: Sequence[object],
    processes: int = 2,
    timeout: float = 240,
    fails: bool = False,
    script: Path = SCRIPT,
    output: Path | None = None,
    nodes: int = 1,
) -> str:
    """Runs a script in several processes, with all that `torchrun` gives them; returns what they printed.

    Args:
        arguments: of the script.
        processes: how many.
        timeout: in seconds.
        fails: whether a process must end with an error; else none may.
        script: that is run.
        output: folder for what they print; None: what `--output` names.
        nodes: how many machines they are to believe that they are on.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    group = {
        **_ON_CPU,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes // nodes),
    }
    local = processes // nodes
    ranks = [
        {**group, "RANK": str(rank), "LOCAL_RANK": str(rank % local), "GROUP_RANK": str(rank // local)}
        for rank in range(processes)
    ]
    output = Path(arguments[arguments.index("--output") + 1]) if output is None else output
    done = run_together(run_as_main, [(script, arguments)] * processes, output, ranks, timeout)
    log = "".join(process.stdout + process.stderr for process in done)
    assert any(process.returncode for process in done) == fails, log[-20000:]
    return log


def launch_alone(
    arguments: Sequence[object], processes: int = 2, timeout: float = 240, script: Path = SCRIPT
) -> list[Finished]:
    """Runs a script in processes that nobody looks after, as a cluster may start them, and waits for all to end.

    The first one holds the store by which they have found each other. Nobody ends the others when one fails.

    Args:
        arguments: of the script.
        processes: how many.
        timeout: seconds after which those that still run are killed, which their exit codes (-9) tell.
        script: that is run.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {
        **_ON_CPU,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    ranks = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    output = Path(arguments[arguments.index("--output") + 1])
    return run_together(run_as_main, [(script, arguments)] * processes, output, ranks, timeout, kills=False)


def launch_by_command(
    arguments: Sequence[object], processes: int = 2, timeout: float = 240, script: Path = SCRIPT, fails: bool = False
) -> str:
    """The same as `launch` by `accelerate launch`, as a user runs it."""
    # `--multi_gpu` is what starts several processes, on a machine without accelerators too (gloo then).
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
    command += ["--multi_gpu"] if processes > 1 else []
    command += ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--num_cpu_threads_per_process", "1", "--main_process_port", "0", str(script), *map(str, arguments)]
    environment = {**os.environ, **_ON_CPU, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert (done.returncode != 0) == fails, done.stdout[-2000:] + done.stderr[-20000:]
    return done.stdout + done.stderr


def seen_by(output: Path) -> list[dict]:
    """What every process of `script_train.py` has written, by rank."""
    return [json.loads(path.read_text()) for path in sorted(output.glob("rank-*.json"))]
