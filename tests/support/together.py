"""Trainings of `tests/distributed/script_settings.py`, in several processes or in this one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from support.launching import launch, launch_by_command, seen_by
from support.processes import ROOT

SCRIPT = ROOT / "tests" / "distributed" / "script_settings.py"

Trained = tuple[list[dict], dict[str, torch.Tensor]]


def given(output: Path, settings: dict) -> list[object]:
    """The arguments of the script."""
    output.mkdir(exist_ok=True)
    return ["--output", output, "--settings", json.dumps(settings)]


def train_together(output: Path, settings: dict, processes: int = 2, by_command: bool = False) -> Trained:
    """What every process has seen, and the weights of the first.

    Args:
        output: folder, made if it does not exist; one that exists goes on with its checkpoints and stores.
        settings: see the script.
        processes: how many.
        by_command: whether `accelerate launch` starts them.
    """
    for path in output.glob("rank-*.json"):
        path.unlink()
    (launch_by_command if by_command else launch)(given(output, settings), processes, script=SCRIPT)
    return seen_by(output), load_file(output / "weights-0.safetensors")


def close(one: Trained, other: Trained, atol: float = 2e-5) -> bool:
    """Whether the losses and the weights of two trainings are the same but for rounding."""
    (first, *_), (second, *_) = one[0], other[0]
    losses = [torch.tensor(seen["losses"]) for seen in (first, second)]
    return torch.allclose(*losses, atol=atol) and all(
        torch.allclose(value, other[1][name], atol=atol) for name, value in one[1].items()
    )


def same(one: Trained, other: Trained) -> bool:
    """Whether the losses and the weights of two trainings are the same to the last bit."""
    losses = one[0][0]["losses"] == other[0][0]["losses"]
    return losses and all(torch.equal(value, other[1][name]) for name, value in one[1].items())
