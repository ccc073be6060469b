"""Single results on the disk, and the learning rates that they choose."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .arms import Arm

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


def chosen_rates(options: argparse.Namespace, task: str, arms: Iterable[Arm], fewest: int = 4) -> dict[str, float]:
    """By arm, the learning rate with the best accuracy on the validation samples.

    Args:
        options: where results are.
        task: its name.
        arms: those that are wanted.
        fewest: an arm with fewer trials is left out.
    """
    done, rates = read_done(options, task), {}
    for arm in arms:
        trials = {
            rate: result["accuracy"]
            for (name, rate, _), result in done.items()
            if name == arm.name and result["is_tuning"]
        }
        if not arm.tuned_as and len(trials) >= fewest:
            rates[arm.name] = max(sorted(trials), key=trials.__getitem__)
    return rates
