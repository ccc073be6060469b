"""Accuracy after training on features that a codec has kept: DeiT-Tiny fine-tuned on CIFAR-10.

python -m benchmarks.codec_accuracy.run --jobs 2
python -m benchmarks.codec_accuracy.run --collect        # the table of what is finished, nothing is trained
"""

from __future__ import annotations

import argparse
import gc
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional
from transformers import Trainer, TrainingArguments, ViTForImageClassification, set_seed

from hf_freezecache import FeatureStore, FreezeCacheConfig, FreezeCacheTrainer
from hf_freezecache.cache.codec.progression import DEFAULT
from hf_freezecache.cache.shards import file_sha256

from .._common import (
    QUIET,
    Claim,
    make_parser,
    prepare,
    quiet,
    result_folder,
    shared_folder,
    silence,
    write_result,
)
from .._images import WEIGHTS, Pixels, as_interpolated_batch
from .._partials import add_run_options, partial_file, read_done, run_tasks, settle_run_options, write_done
from ..finetune_caltech.arms import EpochClock, accuracy
from ..finetune_caltech.tables import paired

NAME = "codec_accuracy"
LIVE, EXACT, PROGRESSIVE = "live", "fp32", "progressive"
ARMS = {codec: {"codec": codec} for codec in (EXACT, "int8", "int4", "int3", "int2", "mixed@2.5")}
ARMS[PROGRESSIVE] = {"progressive": "default"}
#: How much worse than exact features the default codec may be, in points of accuracy.
_LOSS = 0.5
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    names = ("rows", "test_rows", "image_size", "epochs", "points", "batch_size", "learning_rate", "weight_decay")
    return {**{name: getattr(options, name) for name in names}, "progressive": DEFAULT}


def load_cifar10(options: argparse.Namespace, file: str, rows: int) -> Pixels:
    """The first rows (balanced by class), enlarged to `options.image_size`."""
    path = shared_folder(options, "data", "cifar10", file)
    dataset = load_dataset("parquet", data_files=str(path), split="train").select(range(rows))
    enlarge = v2.Compose(
        [
            v2.Resize(options.image_size, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(_MEAN, _STD),
        ]
    )
    pixels = torch.stack([enlarge(functional.pil_to_tensor(image)) for image in dataset["image"]])
    return Pixels(pixels, torch.tensor(dataset["label"]))


def run_seed(seed: int, options: argparse.Namespace) -> None:
    """Trains the epochs before the first freeze, and every arm from their checkpoint; finished ones are skipped."""
    quiet()
    torch.set_num_threads(options.threads)
    settings = settings_of(options)
    done = read_done(options.output_dir, NAME, seed, settings)
    if all(arm in done for arm in ARMS):
        return
    train = load_cifar10(options, "train-00000-of-00005.parquet", options.rows)
    test = load_cifar10(options, "test-00000-of-00001.parquet", options.test_rows)
    folder = Path(options.output_dir) / f"seed-{seed}"

    def note(name: str, result: dict[str, Any]) -> None:
        done[name] = result
        write_done(options.output_dir, NAME, seed, settings, done)
        print(f"seed {seed}, {name}: {100 * result['accuracy']:.2f} %, {result['seconds']:.0f} s", flush=True)

    live_epochs = int(options.points.split(":")[0])
    checkpoint = folder / LIVE / f"checkpoint-{-(-options.rows // options.batch_size) * live_epochs}"
    if LIVE not in done or not checkpoint.exists():
        shutil.rmtree(folder, ignore_errors=True)
        live = train_arm(None, seed, train, test, folder / LIVE, None, options, stop_after=live_epochs)
        live["weights"] = file_sha256(checkpoint / "model.safetensors")
        if done and done[LIVE]["weights"] != live["weights"]:
            done.clear()  # arms are compared only if they branch from the same weights
        note(LIVE, live)
    for name, arm in ARMS.items():
        if name not in done:
            target = folder / name
            note(name, train_arm(arm, seed, train, test, target, checkpoint, options))
            shutil.rmtree(target, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


def train_arm(
    arm: dict[str, str] | None,
    seed: int,
    train: Pixels,
    test: Pixels,
    target: Path,
    checkpoint: Path | None,
    options: argparse.Namespace,
    stop_after: int | None = None,
) -> dict[str, Any]:
    """Trains one arm and returns its measurements.

    Args:
        arm: settings of the codec; None: the epochs that all arms share, by plain `Trainer`.
        seed: of the head, the order of the samples and the dropout.
        train: images.
        test: images.
        target: checkpoints and stores.
        checkpoint: from which the arm branches.
        options: the settings.
        stop_after: epochs after which a checkpoint is saved and the training stops.
    """
    set_seed(seed)
    start = time.perf_counter()
    clock = EpochClock(options.epochs, set() if stop_after is None else {stop_after}, stop_after)
    kwargs = {
        "model": ViTForImageClassification.from_pretrained(
            shared_folder(options, "weights", WEIGHTS),
            num_labels=10,
            ignore_mismatched_sizes=True,
            local_files_only=True,
        ),
        "args": make_args(seed, target, options),
        "train_dataset": train,
        "eval_dataset": test,
        "data_collator": as_interpolated_batch,
        "compute_metrics": accuracy,
        "callbacks": [clock],
    }
    if arm is None:
        trainer = Trainer(**kwargs)
    else:
        config = FreezeCacheConfig(policy="manual", freeze_points=options.points, cache="always", **arm)
        trainer = FreezeCacheTrainer(**kwargs, freeze_cache=config)
    silence(trainer).train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    result = {"accuracy": clock.evaluations[-1]["accuracy"], "epoch_seconds": clock.epoch_seconds}
    if arm is not None:
        store = FeatureStore.open(trainer.freeze_status().store_path)
        result |= {"codec": store.manifest.codec, "bytes_per_sample": store.bytes / len(store)}
        result["stores"] = [
            {"cut": phase["cut"], "bytes": phase["store_bytes"]}
            for phase in trainer.freeze_cache_report().to_dict()["phases"]
            if phase["mode"] == "build"
        ]
    result["seconds"] = time.perf_counter() - start
    del trainer, kwargs
    gc.collect()
    return result


def make_args(seed: int, target: Path, options: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(target),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=50,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=options.weight_decay,
        # `EpochClock` asks for the evaluation at the end and for the checkpoint.
        **QUIET,
        seed=seed,
    )


def collect(options: argparse.Namespace) -> None:
    """Table and JSON of the seeds that are finished.

    Raises:
        SystemExit: if none is.
    """
    settings = settings_of(options)
    runs = {seed: read_done(options.output_dir, NAME, seed, settings) for seed in options.seeds}
    runs = {seed: done for seed, done in runs.items() if all(arm in done for arm in ARMS)}
    if not runs:
        raise SystemExit("no seed is finished yet.")
    arms = {name: compare(name, runs) for name in ARMS}
    text = table(arms, len(runs))
    print(text)
    (result_folder(NAME, options.smoke) / "table.md").write_text(text)
    settings |= {"seeds": list(runs), "jobs": options.jobs, "threads": options.threads}
    claims = []
    interval = arms["int4"]["minus_exact_points"]["interval_95"]
    if interval is not None:
        what = "int4 - fp32, points of accuracy, lower end of the 95 % interval"
        claims.append(Claim(what, interval[0], at_least=-_LOSS))
    write_result(NAME, options, settings, {"arms": arms, "runs": runs}, claims)


def compare(name: str, runs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """An arm over all seeds, paired with exact features."""
    points = [100 * done[name]["accuracy"] for done in runs.values()]
    first = next(iter(runs.values()))[name]
    return {
        "accuracy_percent": {"mean": statistics.mean(points), "sd": statistics.stdev(points) if points[1:] else 0.0},
        "minus_exact_points": paired([100 * (d[name]["accuracy"] - d[EXACT]["accuracy"]) for d in runs.values()]),
        "stores": first["stores"],
        "codec_at_the_end": first["codec"],
    }


def table(arms: dict[str, dict[str, Any]], seeds: int) -> str:
    lines = [
        f"DeiT-Tiny fine-tuned on CIFAR-10, {seeds} seeds",
        "",
        "| codec | stores, MB | accuracy, % | minus fp32 | 95 % interval |",
        "|---|---|---|---|---|",
    ]
    for name, arm in arms.items():
        sizes = ", ".join(f"{store['bytes'] / 1e6:.1f} (cut {store['cut']})" for store in arm["stores"])
        mean, sd = arm["accuracy_percent"]["mean"], arm["accuracy_percent"]["sd"]
        difference, interval = arm["minus_exact_points"], arm["minus_exact_points"]["interval_95"]
        between = "" if interval is None else f"{interval[0]:+.2f} to {interval[1]:+.2f}"
        paired_with = ("", "") if name == EXACT else (f"{difference['mean']:+.2f}", between)
        lines.append(f"| {name} | {sizes} | {mean:.2f} ± {sd:.2f} | {paired_with[0]} | {paired_with[1]} |")
    return "\n".join(lines) + "\n"


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_run_options(parser)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--test_rows", type=int, default=5000)
    parser.add_argument("--image_size", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument(
        "--points", default="3:5,5:10", help="freeze points; all arms share the epochs before the first"
    )
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--weight_decay", type=float, default=0.05)
    options = parser.parse_args(argv)
    if options.smoke:
        options.rows, options.test_rows, options.image_size, options.seeds = 64, 50, 48, [0, 1]
        options.epochs, options.points = 3, "1:5,2:10"
    settle_run_options(options, NAME)
    return options


def main() -> None:
    options = parse_options()
    prepare(options)
    if options.fresh:
        for seed in options.seeds:
            partial_file(options.output_dir, NAME, seed).unlink(missing_ok=True)
    if not options.collect:
        run_tasks(run_seed, [(seed, options) for seed in options.seeds], options.jobs)
    collect(options)


if __name__ == "__main__":
    main()
