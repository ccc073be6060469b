"""Accuracy, seconds and FLOPs of every freezing rule, freezing alone and with a cache.

python -m benchmarks.policies.run --threads 1               # continues after a kill
python -m benchmarks.policies.run --threads 1 --validate    # on held-out training samples, to choose settings
python -m benchmarks.policies.run --collect                 # the table of what is finished
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import set_seed

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer
from hf_freezecache.cache.rows import fetch
from hf_freezecache.config import MAX_FROZEN
from hf_freezecache.training.flops import measure_training_flops

from .._common import Claim, make_parser, pick, prepare, result_folder, silence, write_json, write_result
from .._partials import add_task_options, settle_run_options
from .._statistics import markdown_table
from .._trainings import EpochClock, accuracy
from ..headline.arms import HEAD_START, make_args
from ..headline.tasks import Task, load_task
from .pictures import plot_regret, plot_rules

NO_FREEZING, COLD = "none", "none, cold head"
#: Batches of which the FLOPs of plain training without a report are counted.
COUNTED_BATCHES = 8
#: The task in which every cut is tried at every one of these epochs.
SWEPT, SWEPT_EPOCHS, SWEPT_CUTS = "banking77", (0, 1, 2, 3), (3, 4, 5, 6)


@dataclass(frozen=True)
class Settings:
    """How a task is trained.

    Args:
        rate: learning rate that plain training was tuned to in `benchmarks/headline`.
        epochs: of the training.
        rows: training samples.
        test_rows: test samples.
        bf16: whether steps run in mixed precision.
    """

    rate: float
    epochs: int
    rows: int
    test_rows: int
    bf16: bool = False


SETTINGS = {
    "banking77": Settings(4e-4, 6, 1000, 1000, bf16=True),
    "caltech-112": Settings(2e-4, 6, 1000, 500),
    "cifar10-resnet20": Settings(4e-3, 20, 2000, 1000, bf16=True),
}


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


def make_arms(task: str = "", without: str | None = None) -> list[Arm]:
    """All arms, in the order in which they are trained.

    All have a head start where the model is pretrained, no freezing too; without one it is an arm of its own.

    Args:
        task: name of the task.
        without: folder of predictors that were made without a network, named after the tasks; None: that arm is left
            out.
    """
    rules: list[tuple[str, str, dict[str, Any]]] = [
        ("linear", "linear", {}),
        ("smartfrz", "smartfrz", {}),
        ("autofreeze", "autofreeze", {}),
        ("egeria", "egeria", {}),
        ("simfreeze", "simfreeze", {}),
        ("freezeout", "freezeout", {}),
        ("freezeout, annealed", "freezeout", {"anneal": "cosine", "anneal_scale": True}),
    ]
    other_limits = [
        Arm("linear, to the head", "linear", settings={"max_frozen": 1.0}),
        Arm("smartfrz, three quarters", "smartfrz", settings={"max_frozen": MAX_FROZEN}),
    ]
    alone = [Arm(name, policy, "never", settings) for name, policy, settings in rules]
    cached = [Arm(f"{name}, cached", policy, "always", settings) for name, policy, settings in rules]
    if without is not None:
        unseen = {"predictor": str(Path(without) / task), "max_frozen": MAX_FROZEN}
        alone.insert(2, Arm("smartfrz, network unseen, three quarters", "smartfrz", settings=unseen))
    cold = Arm(COLD, "none", settings={"head_start_epochs": 0})
    return [Arm(NO_FREEZING, "none", settings={"head_start_epochs": HEAD_START}), *alone, *other_limits, cold, *cached]


def make_sweep() -> list[Arm]:
    """One freeze each, at every epoch and cut that hindsight may choose from."""
    points = [(epoch, cut) for epoch in SWEPT_EPOCHS for cut in SWEPT_CUTS]
    return [
        Arm(f"{epoch}:{cut}", "manual", settings={"freeze_points": f"{epoch}:{cut}", "head_start_epochs": HEAD_START})
        for epoch, cut in points
    ]


def train_arm(arm: Arm, seed: int, task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """Trains one arm, evaluates it after every epoch, and returns its measurements.

    Args:
        arm: what to train.
        seed: of everything random.
        task: what is learned.
        options: the settings.
    """
    target = Path(options.output_dir) / "trainings" / result_file(options, task.name, arm.name, seed).stem
    shutil.rmtree(target, ignore_errors=True)
    settings = SETTINGS[task.name]
    epochs = 2 if options.smoke else settings.epochs
    set_seed(seed)
    clock = EpochClock(1, set())
    trainer = FreezeCacheTrainer(
        task.load_model(),
        args=replace(make_args(task, target, options, epochs, settings.rate, seed), bf16=settings.bf16 or options.gpu),
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
    size, counted = trainer.args.per_device_train_batch_size, []
    for first in range(0, min(len(train), COUNTED_BATCHES * size), size):  # texts are padded to the longest of a batch
        rows = fetch(train, range(first, min(first + size, len(train))))
        probe = trainer._prepare_inputs(task.collator(rows))
        counted.append(measure_training_flops(trainer.model, probe))
    return statistics.fmean(counted) * len(train)


def cuts(phases: Iterable[Mapping[str, Any]], epochs: int) -> list[int]:
    """The cut of each epoch, by the phases of a report; 0 where nothing was frozen."""
    found = [phase["cut"] for phase in phases if phase["mode"] in ("live", "replay") for _ in range(phase["epochs"])]
    return sorted(found) + [0] * (epochs - len(found))


def result_file(options: argparse.Namespace, task: str, arm: str, seed: int) -> Path:
    return Path(options.output_dir) / f"{task}-{arm}-{seed}.json".replace(" ", "_")


def run_task(name: str, options: argparse.Namespace) -> None:
    """Trains all arms of a task with all seeds; those that are done are left out."""
    arms = make_sweep() if options.sweep else make_arms(name, options.without)
    missing = [
        (seed, arm)
        for arm in arms
        for seed in options.seeds
        if not result_file(options, name, arm.name, seed).exists()
        and (options.arms is None or arm.name in options.arms)
    ]
    if not missing:
        return
    own = SETTINGS[name]
    sizes = {"rows": options.rows or own.rows, "test_rows": options.test_rows or own.test_rows}
    task = load_task(name, argparse.Namespace(**{**vars(options), **sizes}))
    if options.validate:
        train, held_out = task.split()
        task = replace(task, train=train, test=held_out)
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
        if found := read_results(options, name, make_arms(name, options.without)):
            results[name] = found
    folder = result_folder("policies", options.smoke)
    if options.validate:
        print("\n".join(line for name, arms in results.items() for line in [name, *table(arms), ""]))
        return
    if results:
        plot_rules(results, NO_FREEZING, folder / "rules.png")
    if SWEPT in results and (swept := read_results(options, SWEPT, make_sweep())):
        results[f"{SWEPT}, every cut and epoch"] = swept
        points, rules = compare_with_hindsight(results[SWEPT], swept)
        plot_regret({"task": SWEPT, "points": points}, rules, folder / "regret.png")
    text = "\n".join(line for name, arms in results.items() for line in [f"## {name}", "", *table(arms), ""])
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    claims = [claim for name in options.tasks for claim in make_claims(name, results.get(name, {}))]
    tasks = {name: asdict(SETTINGS[name]) for name in options.tasks}
    settings = {**pick(options, "seeds rows batch_size test_rows"), "tasks": tasks}
    write_result("policies", options, settings, results, claims)


def read_results(options: argparse.Namespace, task: str, arms: Sequence[Arm]) -> dict[str, dict[str, dict[str, Any]]]:
    """What is finished, by arm and seed."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for arm in arms:
        for seed in options.seeds:
            path = result_file(options, task, arm.name, seed)
            if path.exists():
                found.setdefault(arm.name, {})[str(seed)] = json.loads(path.read_text())
    return found


def compare_with_hindsight(
    arms: Mapping[str, Mapping[str, Mapping[str, Any]]], swept: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> tuple[list[dict[str, float]], dict[str, dict[str, float]]]:
    """FLOPs and points of accuracy relative to no freezing: of every cut and epoch, and of every rule.

    Seeds are those that the sweep has: of a rule, the same ones.
    """
    plain = arms[NO_FREEZING]

    def relative(by_seed: Mapping[str, Mapping[str, Any]], seeds: Sequence[str]) -> dict[str, float]:
        return {
            "flops": statistics.fmean(by_seed[seed]["flops"] / plain[seed]["flops"] for seed in seeds),
            "accuracy": statistics.fmean(
                100 * (by_seed[seed]["accuracy"] - plain[seed]["accuracy"]) for seed in seeds
            ),
        }

    seeds = sorted(set(plain).intersection(*swept.values()))
    if not seeds:
        return [], {}
    points = []
    for name, by_seed in swept.items():
        epoch, cut = map(int, name.split(":"))
        points.append({"epoch": epoch, "cut": cut, **relative(by_seed, seeds)})
    rules = {
        name: relative(by_seed, seeds)
        for name, by_seed in arms.items()
        if not name.endswith(", cached") and name != NO_FREEZING and set(seeds) <= set(by_seed)
    }
    return points, rules


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
    """What smartfrz must show, where it was trained: beside no freezing, and beside `linear`."""
    smart, found = arms.get("smartfrz", {}), []
    for name, limit in ((NO_FREEZING, -0.3), ("linear", 0.0)):
        pairs = [(run, arms[name][seed]) for seed, run in smart.items() if seed in arms.get(name, {})]
        if pairs:
            points = statistics.fmean(100 * (run["accuracy"] - other["accuracy"]) for run, other in pairs)
            found.append(Claim(f"{task}: smartfrz minus {name}, points", points, at_least=limit))
    if pairs:
        flops = statistics.fmean(run["flops"] / other["flops"] for run, other in pairs)
        found.append(Claim(f"{task}: FLOPs of smartfrz / linear", flops, at_most=1.0))
    return found


def _mean(runs: Sequence[Mapping[str, Any]], name: str) -> float:
    return statistics.fmean(run[name] for run in runs)


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_task_options(parser, 32)
    parser.add_argument("--without", help="folder of predictors that were made without the network of a task")
    parser.add_argument("--tasks", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--sweep", action="store_true", help=f"try every cut at every epoch of {SWEPT} instead")
    parser.add_argument("--arms", nargs="+", help="names of arms (default: all)")
    parser.add_argument(
        "--validate",
        action="store_true",
        help="train on four fifths of the training samples and evaluate on the others, to choose settings of a rule; "
        "prints a table",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(arguments)
    if options.smoke:
        options.rows, options.test_rows, options.seeds = options.rows or 64, 32, [0]
    options.until = time.time() + options.seconds
    options.tasks = [SWEPT] if options.sweep else options.tasks
    settle_run_options(options, "policies", 1)
    if options.validate:
        options.output_dir = str(Path(options.output_dir).parent / "validation")
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
