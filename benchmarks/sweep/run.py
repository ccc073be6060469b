"""Trainings that share a store: ten trials of a search for a learning rate, and the folds of a cross-validation.

python -m benchmarks.sweep.run --threads 1
"""

from __future__ import annotations

import argparse
import gc
import shutil
import time
from pathlib import Path
from typing import Any

import optuna
from sklearn.model_selection import KFold
from torch.utils.data import Subset
from transformers import Trainer, TrainingArguments, set_seed

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer

from .._common import QUIET, REPOSITORY, Claim, make_parser, pick, prepare, silence, write_result
from .._images import Pixels, add_image_options, as_batch, as_interpolated_batch, load_caltech, load_deit
from .._trainings import accuracy

ARMS: dict[str, str | None] = {"plain": None, "freeze-only": "never", "cached": "always"}


class TrialClock:
    """Notes when each trial has its model."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.starts = options, []

    def __call__(self) -> Any:
        self.starts.append(time.perf_counter())
        return load_deit(self.options)


def split_rows(options: argparse.Namespace) -> tuple[Pixels, Pixels]:
    """Samples to learn from and to choose by: no test images."""
    rows = load_caltech(options, "train", options.image_size, options.rows)
    first = round(0.8 * len(rows))
    return (
        Pixels(rows.pixel_values[:first], rows.labels[:first]),
        Pixels(rows.pixel_values[first:], rows.labels[first:]),
    )


def trainer_arguments(folder: Path, train: Any, validation: Any, options: argparse.Namespace) -> dict[str, Any]:
    """What all arms share."""
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=64,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        **{**QUIET, "eval_strategy": "epoch"},
        seed=options.seed,
    )
    return {
        "args": args,
        "train_dataset": train,
        "eval_dataset": validation,
        "data_collator": as_batch if options.image_size == 224 else as_interpolated_batch,
        "compute_metrics": accuracy,
    }


def make_trainer(arm: str, kwargs: dict[str, Any], options: argparse.Namespace, **settings: Any) -> Trainer:
    """The trainer of an arm."""
    cache = ARMS[arm]
    if cache is None:
        return Trainer(**kwargs)
    points = f"0:{options.cut}"
    config = FreezeCacheConfig(policy="manual", freeze_points=points, cache=cache, report="none", **settings)
    return FreezeCacheTrainer(**kwargs, freeze_cache=config)


def search(arm: str, train: Pixels, validation: Pixels, options: argparse.Namespace) -> dict[str, Any]:
    """Runs all trials of an arm; seconds of each, evaluation included, and what it has found."""
    folder = REPOSITORY / "outputs" / "benchmarks" / "sweep" / arm
    shutil.rmtree(folder, ignore_errors=True)
    clock = TrialClock(options)
    kwargs = {"model_init": clock, **trainer_arguments(folder, train, validation, options)}
    trainer = make_trainer(arm, kwargs, options)
    rates = options.learning_rates
    tried: list[float] = []
    found: dict[float, float] = {}

    def space(trial: optuna.Trial) -> dict[str, float]:
        tried.append(trial.suggest_categorical("learning_rate", rates))
        return {"learning_rate": tried[-1]}

    def objective(metrics: dict[str, float]) -> float:
        found[tried[-1]] = metrics["eval_accuracy"]
        return metrics["eval_accuracy"]

    clock.starts.clear()  # `Trainer` has made a model for itself
    start, cpu_start = time.perf_counter(), time.process_time()
    silence(trainer).hyperparameter_search(
        hp_space=space,
        compute_objective=objective,
        n_trials=len(rates),
        direction="maximize",
        backend="optuna",
        sampler=optuna.samplers.GridSampler({"learning_rate": rates}, seed=options.seed),
    )
    end, cpu_seconds = time.perf_counter(), time.process_time() - cpu_start
    ends = [*clock.starts[1:], end]
    result = {
        "seconds": end - start,
        "cpu_seconds": cpu_seconds,
        "trial_seconds": [later - begin for begin, later in zip(clock.starts, ends, strict=True)],
        "accuracy_by_rate": dict(sorted(found.items())),
        "best_rate": max(sorted(found), key=found.__getitem__),
        "stores": len(list(folder.rglob("manifest.json"))),
    }
    del trainer, kwargs
    gc.collect()
    shutil.rmtree(folder, ignore_errors=True)
    print(f"{arm}: {result['seconds']:.1f} s, best {result['best_rate']:g}", flush=True)
    return result


def cross_validate(arm: str, rows: Pixels, options: argparse.Namespace) -> dict[str, Any]:
    """Trains a model for each fold, the rest of the rows held out; seconds of each, evaluation included."""
    folder = REPOSITORY / "outputs" / "benchmarks" / "sweep" / f"folds-{arm}"
    shutil.rmtree(folder, ignore_errors=True)
    seconds, accuracies, cpu_seconds = [], [], 0.0
    for train_rows, held_out in KFold(options.folds, shuffle=True, random_state=0).split(range(len(rows))):
        train, validation = Subset(rows, train_rows.tolist()), Subset(rows, held_out.tolist())
        kwargs = trainer_arguments(folder, train, validation, options)
        kwargs["args"].learning_rate = options.fold_rate
        set_seed(options.seed)
        start, cpu_start = time.perf_counter(), time.process_time()
        trainer = make_trainer(arm, {"model": load_deit(options), **kwargs}, options, share_store=True)
        silence(trainer).train()
        seconds.append(time.perf_counter() - start)
        cpu_seconds += time.process_time() - cpu_start
        accuracies.append(trainer.state.log_history[-2]["eval_accuracy"])
        del trainer, kwargs
        gc.collect()
    stores = len(list(folder.rglob("manifest.json")))
    shutil.rmtree(folder, ignore_errors=True)
    print(f"{arm}, folds: {sum(seconds):.1f} s", flush=True)
    return {
        "seconds": sum(seconds),
        "cpu_seconds": cpu_seconds,
        "fold_seconds": seconds,
        "accuracy_by_fold": accuracies,
        "stores": stores,
    }


def ratios(what: str, plain: dict[str, Any], frozen: dict[str, Any], cached: dict[str, Any]) -> list[Claim]:
    """Plain and frozen over cached, in seconds of the clock and of the processor."""
    return [
        Claim(f"{kind} of {what}, {name} over cached", arm[key] / cached[key], at_least=limit)
        for kind, key in (("seconds", "seconds"), ("CPU seconds", "cpu_seconds"))
        for name, arm, limit in (("plain", plain, 2), ("frozen", frozen, 1.3))
    ]


def make_claims(results: dict[str, dict[str, Any]]) -> list[Claim]:
    plain, frozen, cached = (results[arm] for arm in ARMS)
    folds = [results[f"{arm}, folds"] for arm in ARMS]
    fold_pairs = zip(folds[1]["accuracy_by_fold"], folds[2]["accuracy_by_fold"], strict=True)
    pairs = zip(frozen["accuracy_by_rate"].values(), cached["accuracy_by_rate"].values(), strict=True)
    apart = max(abs(a - b) for a, b in pairs)
    return [
        Claim("stores of all trials", cached["stores"], at_most=1),
        *ratios("the search", plain, frozen, cached),
        Claim(
            "largest difference of a trial's accuracy, frozen and cached",
            apart,
            at_most=0.01,
        ),
        Claim("stores of all folds", folds[2]["stores"], at_most=1),
        *ratios("the folds", *folds),
        Claim(
            "largest difference of a fold's accuracy, frozen and cached",
            max(abs(a - b) for a, b in fold_pairs),
            at_most=0.01,
        ),
        Claim("both find the same best rate", float(frozen["best_rate"] == cached["best_rate"]), at_least=1),
    ]


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_image_options(parser, 1010, 112)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--cut", type=int, default=10)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--fold_rate", type=float, default=4e-4, help="learning rate of the folds")
    rates = [round(10 ** (-4.3 + 0.2 * number), 6) for number in range(10)]
    parser.add_argument("--learning_rates", type=float, nargs="+", default=rates)
    options = parser.parse_args(argv)
    if options.smoke:
        options.rows, options.epochs, options.learning_rates = 64, 1, [1e-4, 1e-3]
    return options


def main() -> None:
    options = parse_options()
    prepare(options)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    train, validation = split_rows(options)
    results = {arm: search(arm, train, validation, options) for arm in ARMS}
    rows = load_caltech(options, "train", options.image_size, options.rows)
    results |= {f"{arm}, folds": cross_validate(arm, rows, options) for arm in ARMS}
    settings = pick(options, "rows image_size batch_size epochs cut learning_rates folds fold_rate")
    write_result("sweep", options, settings, results, make_claims(results))


if __name__ == "__main__":
    main()
