"""MiniLM on BANKING77: plain, freeze-only and cached training, with texts padded batch by batch.

python -m benchmarks.text.classification --threads 1
python -m benchmarks.text.classification --threads 1 --collect      # the table of what is finished, nothing is trained
"""

from __future__ import annotations

import argparse
import gc
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from hf_freezecache import FeatureStore, FreezeCacheConfig, FreezeCacheTrainer

from .._common import QUIET, Claim, make_parser, pick, prepare, quiet, result_folder, silence, write_result
from .._partials import add_run_options, read_measurements, run_experiments, settle_run_options, write_measurements
from .._statistics import deviation, markdown_table, paired, show_interval, spread
from .._trainings import EpochClock, accuracy
from .sources import add_text_options, load_minilm, load_questions, tokenized

NAME, TUNING = "classification", "classification-tuning"
PLAIN, FREEZE_ONLY = "plain", "freeze-only"
#: The default of `FreezeCacheConfig`.
DEFAULT = "cached default"


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        cache: of `FreezeCacheConfig`; None is plain `Trainer`.
        codec: of `FreezeCacheConfig`.
        tuned_as: the arm whose learning rate it has.
    """

    cache: str | None
    codec: str = "fp32"
    tuned_as: str = FREEZE_ONLY


ARMS = {
    PLAIN: Arm(None, tuned_as=PLAIN),
    FREEZE_ONLY: Arm("never"),
    "cached fp32": Arm("always", "fp32"),
    "cached int8": Arm("always", "int8"),
    DEFAULT: Arm("always", FreezeCacheConfig().codec),
}
_CUT = 5
_VALIDATION = 0.2


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    names = "rows test_rows epochs batch_size learning_rates tuning_seed sampling padding"
    return {**pick(options, names), "cut": _CUT}


def load_rows(options: argparse.Namespace, tokenizer: Any) -> tuple[Dataset, Dataset]:
    """Training and test questions as tokens, not padded."""
    train, test = (load_questions(options, split).shuffle(seed=0) for split in ("train", "test"))
    return (
        tokenized(train.select(range(options.rows)), tokenizer),
        tokenized(test.select(range(min(options.test_rows, len(test)))), tokenizer),
    )


def tune(options: argparse.Namespace) -> None:
    """Accuracy on validation questions of the arms that others are tuned as, at every learning rate; finished stay."""
    settings = settings_of(options)
    done = read_measurements(options.output_dir, TUNING, options.tuning_seed, settings)
    for name in tuned_arms(options):
        for rate in options.learning_rates:
            key = f"{name} {rate:g}"
            if key in done:
                continue
            _, tokenizer = load_minilm(options)
            rows, _ = load_rows(options, tokenizer)
            first = int(len(rows) * (1 - _VALIDATION))
            train, validation = rows.select(range(first)), rows.select(range(first, len(rows)))
            done[key] = train_arm(ARMS[name], rate, options.tuning_seed, train, validation, options)
            write_measurements(options.output_dir, TUNING, options.tuning_seed, settings, done)
            print(f"{key}: {100 * done[key]['accuracy']:.2f} % of the validation questions", flush=True)


def tuned_rates(options: argparse.Namespace) -> dict[str, float]:
    """The learning rate with the highest validation accuracy, for every arm that was tuned."""
    done = read_measurements(options.output_dir, TUNING, options.tuning_seed, settings_of(options))
    return {
        name: max(options.learning_rates, key=lambda rate: done[f"{name} {rate:g}"]["accuracy"])
        for name in tuned_arms(options)
    }


def tuned_arms(options: argparse.Namespace) -> list[str]:
    """The arms whose learning rate the chosen arms have."""
    return sorted({ARMS[name].tuned_as for name in options.arms}, key=list(ARMS).index)


def run_seed(seed: int, options: argparse.Namespace) -> None:
    """Trains the arms with a seed; finished ones are skipped."""
    quiet()
    torch.set_num_threads(options.threads)
    tune(options)
    rates, settings = tuned_rates(options), settings_of(options)
    done = read_measurements(options.output_dir, NAME, seed, settings)
    # The order changes from seed to seed, so that a drift of the machine hits all arms.
    turn = seed % len(options.arms)
    for name in [*options.arms[turn:], *options.arms[:turn]]:
        if name in done:
            continue
        _, tokenizer = load_minilm(options)
        train, test = load_rows(options, tokenizer)
        done[name] = train_arm(ARMS[name], rates[ARMS[name].tuned_as], seed, train, test, options)
        write_measurements(options.output_dir, NAME, seed, settings, done)
        result = done[name]
        print(
            f"seed {seed}, {name}: {100 * result['accuracy']:.2f} %, run {result['run_seconds']:.1f} s, of it "
            f"evaluation {result['eval_seconds']:.1f} s",
            flush=True,
        )


def train_arm(
    arm: Arm, rate: float, seed: int, train: Dataset, test: Dataset, options: argparse.Namespace
) -> dict[str, Any]:
    """Trains one arm and returns its measurements.

    Args:
        arm: what to train.
        rate: the learning rate.
        seed: of the head, the order of the samples and the dropout.
        train: rows of tokens.
        test: rows of tokens, evaluated once, at the end.
        options: the settings.
    """
    target = Path(options.output_dir) / f"training-{seed}"
    shutil.rmtree(target, ignore_errors=True)
    set_seed(seed)
    model, tokenizer = load_minilm(options)
    clock = EpochClock(options.epochs, set())
    kwargs: dict[str, Any] = {
        "model": model,
        "args": make_args(rate, seed, target, options),
        "train_dataset": train,
        "eval_dataset": test,
        "data_collator": DataCollatorWithPadding(tokenizer, padding=options.padding, max_length=options.longest),
        "compute_metrics": accuracy,
        "callbacks": [clock],
    }
    start, cpu_start = time.perf_counter(), time.process_time()
    if arm.cache is None:
        trainer = Trainer(**kwargs)
    else:
        config = FreezeCacheConfig(policy="manual", freeze_points=f"0:{_CUT}", cache=arm.cache, codec=arm.codec)
        trainer = FreezeCacheTrainer(**kwargs, freeze_cache=config)
    losses = silence(trainer).train().training_loss
    result = {
        "learning_rate": rate,
        "accuracy": clock.evaluations[-1]["accuracy"],
        "training_loss": losses,
        "run_seconds": time.perf_counter() - start,
        "run_cpu_seconds": time.process_time() - cpu_start,
        "train_seconds": sum(clock.epoch_seconds),
        "epoch_seconds": clock.epoch_seconds,
        "setup_seconds": clock.setup_seconds,
        "eval_seconds": clock.eval_seconds,
    }
    if arm.cache is not None:
        report = trainer.freeze_cache_report()
        result |= {"build_seconds": report.totals.build_seconds, "phases": report.to_dict()["phases"]}
    if arm.cache == "always":
        store = FeatureStore.open(trainer.freeze_status().store_path)
        tokens = sum(map(len, train["input_ids"]))
        result |= {
            "codec": store.manifest.codec,
            "store_bytes": store.bytes,
            "tokens": tokens,
            "bytes_per_token": store.bytes / tokens,
        }
    del trainer, kwargs
    gc.collect()
    shutil.rmtree(target, ignore_errors=True)
    return result


def make_args(rate: float, seed: int, target: Path, options: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(target),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.01,
        train_sampling_strategy=options.sampling,
        # `EpochClock` asks for the evaluation at the end.
        **QUIET,
        seed=seed,
    )


def collect(options: argparse.Namespace) -> None:
    """Table and JSON of the seeds that are finished.

    Raises:
        SystemExit: if none is.
    """
    settings = settings_of(options)
    runs = {seed: read_measurements(options.output_dir, NAME, seed, settings) for seed in options.seeds}
    runs = {seed: done for seed, done in runs.items() if all(arm in done for arm in options.arms)}
    if not runs:
        raise SystemExit("no seed is finished yet.")
    arms = {name: one_arm(name, runs) for name in options.arms}
    text = table(arms, len(runs))
    print(text)
    folder = result_folder("text", options.smoke)
    (folder / "classification.md").write_text(text)
    tuning = read_measurements(options.output_dir, TUNING, options.tuning_seed, settings)
    tuning = {key: result["accuracy"] for key, result in tuning.items()}
    settings |= {"seeds": list(runs), "jobs": options.jobs, "threads": options.threads}
    content = {"arms": arms, "tuning": tuning, "tuned": tuned_rates(options), "runs": runs}
    write_result("text", options, settings, content, make_claims(arms), "classification.json")


def one_arm(name: str, runs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """An arm over all seeds, paired with the plain and with the freeze-only arm."""
    rows = [done[name] for done in runs.values()]
    points = [100 * row["accuracy"] for row in rows]
    result: dict[str, Any] = {
        "learning_rate": rows[0]["learning_rate"],
        "accuracy_percent": {"mean": statistics.mean(points), "sd": deviation(points), "by_seed": points},
        "run_seconds": spread([row["run_seconds"] for row in rows]),
        "run_cpu_seconds": spread([row["run_cpu_seconds"] for row in rows]),
        "train_seconds": spread([row["train_seconds"] for row in rows]),
        "build_seconds": statistics.median(row.get("build_seconds", 0.0) for row in rows),
        "setup_seconds": statistics.median(row["setup_seconds"] for row in rows),
        "eval_seconds": statistics.median(row["eval_seconds"] for row in rows),
        "bytes_per_token": rows[0].get("bytes_per_token"),
    }
    for other in (PLAIN, FREEZE_ONLY):
        if all(other in done for done in runs.values()):
            base = [done[other] for done in runs.values()]
            faster = [b["run_seconds"] / row["run_seconds"] for b, row in zip(base, rows, strict=True)]
            result[f"minus_{other}_points"] = paired(
                [100 * (row["accuracy"] - b["accuracy"]) for b, row in zip(base, rows, strict=True)]
            )
            result[f"speedup_over_{other}"] = spread(faster)
            cpu = [b["run_cpu_seconds"] / row["run_cpu_seconds"] for b, row in zip(base, rows, strict=True)]
            result[f"cpu_speedup_over_{other}"] = spread(cpu)
    return result


def table(arms: dict[str, dict[str, Any]], seeds: int) -> str:
    header = (
        "arm | learning rate | accuracy, % | minus freeze-only | 95 % interval | run s (min to max) | of it build s | "
        "before the first epoch s | evaluation s | over plain | over freeze-only | run CPU s (min to max) | "
        "over freeze-only in CPU s | bytes a token"
    )
    rows = []
    for name, arm in arms.items():
        mean, sd, seconds = arm["accuracy_percent"]["mean"], arm["accuracy_percent"]["sd"], arm["run_seconds"]
        difference = arm.get(f"minus_{FREEZE_ONLY}_points")
        speedups = [arm.get(f"speedup_over_{other}") for other in (PLAIN, FREEZE_ONLY)]
        rows.append(
            (
                name,
                f"{arm['learning_rate']:g}",
                f"{mean:.2f} ± {sd:.2f}",
                "" if difference is None else f"{difference['mean']:+.2f}",
                "" if difference is None else show_interval(difference["interval_95"]),
                f"{seconds['median']:.1f} ({seconds['min']:.1f} to {seconds['max']:.1f})",
                f"{arm['build_seconds']:.1f}",
                f"{arm['setup_seconds']:.1f}",
                f"{arm['eval_seconds']:.1f}",
                *("" if speedup is None else f"{speedup['median']:.2f}" for speedup in speedups),
                "{median:.1f} ({min:.1f} to {max:.1f})".format(**arm["run_cpu_seconds"]),
                f"{arm[f'cpu_speedup_over_{FREEZE_ONLY}']['median']:.2f}",
                "" if arm["bytes_per_token"] is None else f"{arm['bytes_per_token']:.0f}",
            )
        )
    lines = [f"MiniLM on BANKING77, cut {_CUT} of 7 from epoch 0, {seeds} seeds", "", *markdown_table(header, rows)]
    return "\n".join(lines) + "\n"


def make_claims(arms: dict[str, dict[str, Any]]) -> list[Claim]:
    claims = []
    for name, arm in arms.items():
        if name.startswith("cached"):
            interval = arm[f"minus_{FREEZE_ONLY}_points"]["interval_95"]
            if interval is not None:
                what = f"{name} - freeze-only, points of accuracy, lower end of the 95 % interval"
                claims.append(Claim(what, interval[0], at_least=-0.5))
            what = f"{name} over freeze-only, whole run"
            claims.append(Claim(what, arm[f"speedup_over_{FREEZE_ONLY}"]["median"], at_least=1.3))
            claims.append(
                Claim(f"{what}, in CPU seconds", arm[f"cpu_speedup_over_{FREEZE_ONLY}"]["median"], at_least=1.3)
            )
    return claims


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_run_options(parser)
    add_text_options(parser)
    parser.set_defaults(seeds=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--test_rows", type=int, default=1540)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--tuning_seed", type=int, default=100)
    parser.add_argument("--sampling", default="group_by_length", choices=["random", "group_by_length"])
    parser.add_argument("--padding", default="longest", choices=["longest", "max_length"])
    parser.add_argument("--longest", type=int, default=128, help="width of --padding max_length, in tokens")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    options = parser.parse_args(argv)
    if options.smoke:
        options.rows, options.test_rows, options.epochs, options.seeds = 64, 32, 2, [0, 1]
        options.learning_rates = [5e-4]
    settle_run_options(options, "text", options.jobs)
    return options


def main() -> None:
    options = parse_options()
    prepare(options)
    run_experiments(options, {NAME: run_seed}, collect)


if __name__ == "__main__":
    main()
