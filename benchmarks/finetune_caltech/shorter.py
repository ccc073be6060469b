"""Plain training of fewer epochs, also with a head start, beside the arms of the experiment: accuracy and FLOPs.

python -m benchmarks.finetune_caltech.shorter --threads 1      # continues after a kill

Neither depends on the machine's load. Needs the experiment's `result.json`, beside whose arms the table puts them.
"""

from __future__ import annotations

import copy
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from hf_freezecache import FreezeCacheConfig

from .._common import REPOSITORY, describe_machine, pick, prepare, quiet, result_folder, write_json
from .._statistics import deviation, markdown_table
from .arms import PLAIN, Arm, Data, train_arm
from .run import parse_options

FOLDER = REPOSITORY / "benchmarks" / "finetune_caltech"
#: Epochs of the trainings, and of the head start of some of them.
ARMS = {"plain 3": (3, 0), "plain 4": (4, 0), "plain 6": (6, 0), "plain 4, head start": (4, 2)}


def train_short(arm: Arm, epochs: int, seed: int, data: Data, options: Any) -> dict[str, Any]:
    """One training; its learning rate falls to 0 within its own epochs."""
    settings = copy.copy(options)
    settings.epochs, settings.evaluate_every, settings.schedules = epochs, epochs, []
    folder = Path(tempfile.mkdtemp())
    try:
        result = train_arm(arm, seed, data, folder, None, settings)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"accuracy": result["accuracy"], "flops": result["flops"], "seconds": result["train_seconds"]}


def make_table(arms: dict[str, dict[str, Any]], before: dict[str, Any]) -> str:
    """All arms by FLOPs."""
    rows = [(name, arm["flops"], arm["accuracy_percent"]["by_seed"]) for name, arm in before.items()]
    for name, seeds in arms.items():
        runs = list(seeds.values())
        rows.append((name, runs[0]["flops"], [100 * run["accuracy"] for run in runs]))
    lines = [
        [name, f"{statistics.mean(points):.2f} ± {deviation(points):.2f}", len(points), f"{flops / 1e12:.2f}"]
        for name, flops, points in sorted(rows, key=lambda row: row[1])
    ]
    return markdown_table(["arm", "accuracy, %", "seeds", "TFLOP"], lines)


def main() -> None:
    options = parse_options()
    prepare(options)
    quiet()
    torch.set_num_threads(options.threads)
    data, folder = Data.load(options), result_folder("finetune_caltech", options.smoke)
    target = folder / "shorter.json"
    arms = json.loads(target.read_text())["arms"] if target.exists() else {}
    for seed in options.seeds:
        for name, (epochs, head_start) in ARMS.items():
            runs = arms.setdefault(name, {})
            if str(seed) in runs:
                continue
            config = FreezeCacheConfig(policy="none", head_start_epochs=head_start) if head_start else None
            runs[str(seed)] = train_short(Arm(PLAIN, config=config), epochs, seed, data, options)
            settings = pick(options, "image_size batch_size learning_rate warmup weight_decay threads")
            write_json(target, {"settings": settings, "arms": arms, "machine": describe_machine()})
            print(f"seed {seed}, {name}: {100 * runs[str(seed)]['accuracy']:.2f} %", flush=True)
    before = json.loads((FOLDER / "result.json").read_text())["results"]["arms"]
    text = make_table(arms, before)
    (folder / "shorter.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
