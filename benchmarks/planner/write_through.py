"""Write-through against a build at the freeze: seconds from the freeze on, and accuracy.

python -m benchmarks.planner.write_through

Both run the prefix once on every view of every image; one in passes of its own, the other in its first epochs.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer, ReplayableTransform

from .._common import QUIET, Claim, in_turn, make_parser, pick, prepare, silence, summary, write_result
from .._trainings import EpochClock, accuracy
from ..augmentation.experiments import Data, Experiment, make_experiments

WAYS = ("upfront", "write_through")
#: What write-through may take at most of the time of a build at the freeze, and lose of its accuracy.
MOST_TIME, MOST_LOST = 1.05, 0.01


def train(
    way: str, seed: int, experiment: Experiment, data: Data, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Fine-tunes with the first blocks frozen from the beginning, so that every second is one after the freeze."""
    set_seed(seed)
    clock = EpochClock(options.epochs, set())
    config = FreezeCacheConfig(
        policy="manual",
        freeze_points=f"0:{options.cut}",
        cache="always",
        codec=options.codec,
        views=options.views,
        materialize=way,
        feature_cache_dir=str(folder / "cache"),
    )
    trainer = FreezeCacheTrainer(
        model=experiment.load_model(options),
        args=TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=100,
            learning_rate=experiment.learning_rate,
            lr_scheduler_type="cosine",
            **experiment.arguments,
            # `EpochClock` asks for the evaluation.
            **QUIET,
            seed=seed,
        ),
        train_dataset=data.train.with_transform(ReplayableTransform(train=experiment.train, base=experiment.base)),
        eval_dataset=data.test,
        data_collator=experiment.collator,
        compute_metrics=accuracy,
        callbacks=[clock],
        freeze_cache=config,
    )
    silence(trainer).train()
    report, status = trainer.freeze_cache_report(), trainer.freeze_status()
    result = {
        "seed": seed,
        "seconds": sum(clock.epoch_seconds),
        "epoch_seconds": clock.epoch_seconds,
        "accuracy": clock.evaluations[-1]["accuracy"],
        "store_bytes": status.store_bytes,
        "phases": report.to_dict()["phases"],
    }
    del trainer
    gc.collect()
    shutil.rmtree(folder, ignore_errors=True)
    return result


def measure(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Every seed with both ways, in turn."""
    experiment = make_experiments(options)["caltech"]
    data = experiment.load_data(options, options.rows, options.test_rows)
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(options.seeds):
            for way in in_turn(WAYS, number):
                runs[way].append(train(way, seed, experiment, data, Path(folder) / way, options))
                last = runs[way][-1]
                print(f"seed {seed}, {way}: {last['seconds']:.1f} s, accuracy {last['accuracy']:.4f}", flush=True)
    return runs


def compare(runs: dict[str, list[dict[str, Any]]]) -> tuple[dict[str, Any], list[Claim]]:
    """Medians of both ways and of the pairs."""
    pairs = list(zip(*(runs[way] for way in WAYS), strict=True))
    ratios = [written["seconds"] / built["seconds"] for built, written in pairs]
    gains = [written["accuracy"] - built["accuracy"] for built, written in pairs]
    results = {
        "seconds": {way: summary([run["seconds"] for run in runs[way]]) for way in WAYS},
        "first_epoch_seconds": {way: summary([run["epoch_seconds"][0] for run in runs[way]]) for way in WAYS},
        "accuracy": {way: summary([run["accuracy"] for run in runs[way]]) for way in WAYS},
        "ratio_of_pairs": summary(ratios),
        "accuracy_gain_of_pairs": summary(gains),
        "runs": runs,
    }
    what = "seconds from the freeze on, write-through / upfront, median of pairs"
    claims = [
        Claim(what, statistics.median(ratios), at_most=MOST_TIME),
        Claim("accuracy, write-through - upfront, mean of pairs", statistics.fmean(gains), at_least=-MOST_LOST),
    ]
    return results, claims


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--cut", type=int, default=8)
    parser.add_argument("--codec", default="int4")
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--test_rows", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch_size", type=int, default=32)
    options = parser.parse_args(argv)
    if options.smoke:
        options.seeds, options.rows, options.test_rows, options.epochs = [0, 1], 48, 20, 3
    return options


def main() -> None:
    options = parse_options()
    prepare(options)
    results, claims = compare(measure(options))
    settings = pick(options, "seeds cut codec views rows test_rows epochs batch_size")
    write_result("planner", options, settings, results, claims, file="write_through.json")


if __name__ == "__main__":
    main()
