"""Accuracy, seconds and FLOPs of every freezing rule, freezing alone and with a cache.

python -m benchmarks.policies.run --threads 1               # continues after a kill
python -m benchmarks.policies.run --collect                 # the table of what is finished
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import set_seed

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer
from hf_freezecache.training.flops import measure_training_flops

from .._common import Claim, make_parser, pick, prepare, result_folder, silence, write_json, write_result
from .._partials import add_task_options, settle_run_options
from .._statistics import markdown_table
from .._trainings import EpochClock, accuracy
from ..headline.arms import make_args
from ..headline.tasks import TASKS, Task, load_task

#: Tasks, with a learning rate that plain training was tuned to, and numbers of epochs.
RATES = {"caltech-112": (2e-4, 6), "cifar10-resnet20": (4e-3, 20), "banking77": (4e-4, 6)}
NO_FREEZING = "none"


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        name: in tables and files.
        policy: name of the rule.
        cache: of `FreezeCacheConfig`.
        settings: further ones.
    """

    name: str
    policy: str
    cache: str = "never"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> FreezeCacheConfig:
        """The settings of `FreezeCacheTrainer`."""
        return FreezeCacheConfig(policy=self.policy, cache=self.cache, **self.settings)  # type: ignore[arg-type]


def make_arms(predictor: str | None) -> list[Arm]:
    """All arms.

    Args:
        predictor: of policy smartfrz: folder or id on the Hub; None: that policy is left out.
    """
    rules = [
        ("linear", "linear", {}),
        ("freezeout", "freezeout", {}),
        ("freezeout, annealed", "freezeout", {"anneal": "cosine", "anneal_scale": True}),
        ("autofreeze", "autofreeze", {}),
        ("egeria", "egeria", {}),
        ("simfreeze", "simfreeze", {}),
    ]
    if predictor is not None:
        rules.append(("smartfrz", "smartfrz", {"predictor": predictor}))
    arms = [Arm(NO_FREEZING, "none")]
    for name, policy, settings in rules:
        arms += [Arm(name, policy, "never", settings), Arm(f"{name}, cached", policy, "auto", settings)]
    return arms


def train_arm(arm: Arm, seed: int, task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """Trains one arm, evaluates it after every epoch, and returns its measurements.

    Args:
        arm: what to train.
        seed: of everything random.
        task: what is learned.
        options: the settings.
    """
    target = Path(options.output_dir) / "training"
    shutil.rmtree(target, ignore_errors=True)
    rate, epochs = RATES[task.name]
    epochs = 2 if options.smoke else epochs
    set_seed(seed)
    clock = EpochClock(1, set())
    trainer = FreezeCacheTrainer(
        task.load_model(),
        args=make_args(task, target, options, epochs, rate, seed),
        train_dataset=task.train,
        eval_dataset=task.test,
        data_collator=task.collator,
        compute_metrics=accuracy,
        callbacks=[clock],
        freeze_cache=arm.config(),
    )
    start = time.perf_counter()
    silence(trainer).train()
    seconds = time.perf_counter() - start - clock.eval_seconds
    report = trainer.freeze_cache_report()
    shutil.rmtree(target, ignore_errors=True)
    by_epoch = [entry["accuracy"] for entry in clock.evaluations]
    best = max(range(len(by_epoch)), key=by_epoch.__getitem__)
    return {
        "accuracy": by_epoch[-1],
        "accuracy_by_epoch": by_epoch,
        "best_accuracy": by_epoch[best],
        "seconds": seconds,
        "seconds_to_best": clock.setup_seconds + sum(clock.epoch_seconds[: best + 1]),
        "flops": report.totals.flops or plain_flops(trainer, task) * epochs,
        "cut_by_epoch": cuts(report.to_dict()["phases"], epochs),
        "phases": report.to_dict()["phases"],
    }


def plain_flops(trainer: FreezeCacheTrainer, task: Task) -> float:
    """FLOPs of an epoch of plain training, which has no report."""
    train: Any = task.train
    rows = train.__getitems__([0, 1]) if hasattr(train, "__getitems__") else [train[0], train[1]]
    probe = trainer._prepare_inputs(task.collator(rows))
    return measure_training_flops(trainer.model, probe) * len(train)


def cuts(phases: Iterable[Mapping[str, Any]], epochs: int) -> list[int]:
    """The cut of each epoch, by the phases of a report; 0 where nothing was frozen."""
    found = [phase["cut"] for phase in phases if phase["mode"] in ("live", "replay") for _ in range(phase["epochs"])]
    return sorted(found) + [0] * (epochs - len(found))


def result_file(options: argparse.Namespace, task: str, arm: str, seed: int) -> Path:
    return Path(options.output_dir) / f"{task}-{arm}-{seed}.json".replace(" ", "_")


def run_task(name: str, options: argparse.Namespace) -> None:
    """Trains all arms of a task with all seeds; those that are done are left out."""
    arms = make_arms(options.predictor)
    missing = [
        (seed, arm)
        for seed in options.seeds
        for arm in arms
        if not result_file(options, name, arm.name, seed).exists()
    ]
    if not missing:
        return
    task = load_task(name, options)
    for seed, arm in missing:
        if time.time() > options.until:
            return
        result = train_arm(arm, seed, task, options)
        write_json(result_file(options, name, arm.name, seed), result)
        print(
            f"{name}, {arm.name}, seed {seed}: {100 * result['accuracy']:.1f} %, {result['seconds']:.0f} s", flush=True
        )


def collect(options: argparse.Namespace) -> None:
    """Writes the table and the results of what is finished."""
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for name in options.tasks:
        for arm in make_arms(options.predictor):
            for seed in options.seeds:
                path = result_file(options, name, arm.name, seed)
                if path.exists():
                    results.setdefault(name, {}).setdefault(arm.name, {})[str(seed)] = json.loads(path.read_text())
    text = "\n".join(line for name, arms in results.items() for line in [f"## {name}", "", *table(arms), ""])
    (result_folder("policies", options.smoke) / "table.md").write_text(text + "\n", encoding="utf-8")
    claims = [claim for name, arms in results.items() for claim in make_claims(name, arms)]
    write_result("policies", options, pick(options, "tasks seeds rows batch_size test_rows"), results, claims)


def table(arms: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """A table of a task, one arm a line; means over seeds."""
    plain = arms.get(NO_FREEZING, {})
    rows = []
    for name, by_seed in arms.items():
        runs = list(by_seed.values())
        pairs = [(run["accuracy"] - plain[seed]["accuracy"]) * 100 for seed, run in by_seed.items() if seed in plain]
        flops = [run["flops"] / plain[seed]["flops"] for seed, run in by_seed.items() if seed in plain]
        cells = [
            f"{100 * _mean(runs, 'accuracy'):.1f}",
            f"{statistics.fmean(pairs):+.1f}" if pairs else "",
            f"{_mean(runs, 'seconds'):.0f}",
            f"{_mean(runs, 'seconds_to_best'):.0f}",
            f"{statistics.fmean(flops):.2f}" if flops else "",
            " ".join(map(str, runs[0]["cut_by_epoch"])),
            str(len(runs)),
        ]
        rows.append([name, *cells])
    return markdown_table(
        "rule | accuracy, % | minus no freezing | seconds | seconds to the best accuracy | FLOPs relative to no "
        "freezing | cut by epoch, first seed | seeds",
        rows,
    )


def make_claims(task: str, arms: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[Claim]:
    """What smartfrz must show, where it was trained."""
    plain, smart = arms.get(NO_FREEZING, {}), arms.get("smartfrz", {})
    pairs = [100 * (run["accuracy"] - plain[seed]["accuracy"]) for seed, run in smart.items() if seed in plain]
    return (
        [Claim(f"{task}: smartfrz minus no freezing, points", statistics.fmean(pairs), at_least=-0.3)] if pairs else []
    )


def _mean(runs: Sequence[Mapping[str, Any]], name: str) -> float:
    return statistics.fmean(run[name] for run in runs)


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_task_options(parser, 32)
    parser.add_argument("--predictor", help="of policy smartfrz, which is left out without one")
    parser.add_argument("--tasks", nargs="+", default=list(RATES), choices=[name for name in TASKS if name in RATES])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(arguments)
    if options.smoke:
        options.rows, options.test_rows, options.seeds = options.rows or 64, 32, [0]
    options.until = time.time() + options.seconds
    settle_run_options(options, "policies", 1)
    return options


def main() -> None:
    options = parse_options()
    prepare(options)
    if not options.collect:
        for name in options.tasks:
            run_task(name, options)
    collect(options)


if __name__ == "__main__":
    main()
