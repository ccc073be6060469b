"""Single results on the disk, and the learning rates that they choose."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Result = dict[str, Any]
#: By arm, learning rate and seed.
Done = dict[tuple[str, float, int], Result]


def result_file(options: argparse.Namespace, task: str, arm: str, rate: float, seed: int) -> Path:
    """Where a training leaves its result."""
    name = f"{arm}-{rate:g}-{seed}".replace(" ", "_").replace(",", "")
    return Path(options.output_dir) / ("gpu" if options.gpu else "cpu") / task / f"{name}.json"


def read_done(options: argparse.Namespace, task: str) -> Done:
    """The results that are there."""
    folder = result_file(options, task, "", 0, 0).parent
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {(result["arm"], result["learning_rate"], result["seed"]): result for result in results}


def trials_of(done: Done, arm: str) -> dict[float, float]:
    """Accuracies of an arm on the validation samples, by learning rate."""
    return {
        rate: result["accuracy"]
        for (name, rate, _), result in sorted(done.items())
        if name == arm and result["is_tuning"]
    }


def chosen_rate(done: Done, arm: str) -> float | None:
    """The learning rate of an arm with the best accuracy on the validation samples; None where none was tried."""
    trials = trials_of(done, arm)
    return max(trials, key=trials.__getitem__) if trials else None
