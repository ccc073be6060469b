"""Accuracy after training on features that a codec has encoded: DeiT-Tiny fine-tuned on CIFAR-10.

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
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional
from transformers import Trainer, TrainingArguments, set_seed

from hf_freezecache import FeatureStore, FreezeCacheConfig, FreezeCacheTrainer
from hf_freezecache.cache.codec.progression import DEFAULT
from hf_freezecache.cache.shards import file_sha256

from .._common import QUIET, Claim, make_parser, pick, prepare, quiet, result_folder, silence, write_result
from .._images import FINISH, Pixels, add_image_options, as_interpolated_batch, load_cifar10, load_deit
from .._partials import add_run_options, read_measurements, run_experiments, settle_run_options, write_measurements
from .._statistics import deviation, markdown_table, paired, show_interval
from .._trainings import EpochClock, accuracy

NAME = "codec_accuracy"
LIVE, EXACT, PROGRESSIVE = "live", "fp32", "progressive"
ARMS = {codec: {"codec": codec} for codec in (EXACT, "int8", "int4", "int3", "int2", "mixed@2.5")}
ARMS[PROGRESSIVE] = {"progressive": "default"}
#: How much worse than exact features the default codec may be, in points of accuracy.
_LOSS = 0.5


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    names = "rows test_rows image_size epochs points batch_size learning_rate weight_decay"
    return {**pick(options, names), "progressive": DEFAULT}


def load_images(options: argparse.Namespace, split: str, rows: int) -> Pixels:
    """The first rows of CIFAR-10 (balanced by class), enlarged to `options.image_size`."""
    dataset = load_cifar10(options, split, rows)
    enlarge = v2.Compose(
        [v2.Resize(options.image_size, interpolation=InterpolationMode.BICUBIC, antialias=True), *FINISH]
    )
    pixels = torch.stack([enlarge(functional.pil_to_tensor(image)) for image in dataset["image"]])
    return Pixels(pixels, torch.tensor(dataset["label"]))


def run_seed(seed: int, options: argparse.Namespace) -> None:
    """Trains the epochs before the first freeze, and every arm from their checkpoint; finished ones are skipped."""
    quiet()
    torch.set_num_threads(options.threads)
    settings = settings_of(options)
    measurements = read_measurements(options.output_dir, NAME, seed, settings)
    if all(arm in measurements for arm in ARMS):
        return
    train = load_images(options, "train", options.rows)
    test = load_images(options, "test", options.test_rows)
    folder = Path(options.output_dir) / f"seed-{seed}"

    def note(name: str, result: dict[str, Any]) -> None:
        measurements[name] = result
        write_measurements(options.output_dir, NAME, seed, settings, measurements)
        print(f"seed {seed}, {name}: {100 * result['accuracy']:.2f} %, {result['seconds']:.0f} s", flush=True)

    live_epochs = int(options.points.split(":")[0])
    checkpoint = folder / LIVE / f"checkpoint-{-(-options.rows // options.batch_size) * live_epochs}"
    if LIVE not in measurements or not checkpoint.exists():
        shutil.rmtree(folder, ignore_errors=True)
        live = train_arm(None, seed, train, test, folder / LIVE, None, options, stop_after=live_epochs)
        live["weights"] = file_sha256(checkpoint / "model.safetensors")
        if measurements and measurements[LIVE]["weights"] != live["weights"]:
            measurements.clear()  # arms are compared only if they branch from the same weights
        note(LIVE, live)
    for name, arm in ARMS.items():
        if name not in measurements:
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
        "model": load_deit(options, classes=10),
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
    runs = {seed: read_measurements(options.output_dir, NAME, seed, settings) for seed in options.seeds}
    runs = {seed: measurements for seed, measurements in runs.items() if all(arm in measurements for arm in ARMS)}
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
    points = [100 * measurements[name]["accuracy"] for measurements in runs.values()]
    first = next(iter(runs.values()))[name]
    return {
        "accuracy_percent": {"mean": statistics.mean(points), "sd": deviation(points)},
        "minus_exact_points": paired([100 * (d[name]["accuracy"] - d[EXACT]["accuracy"]) for d in runs.values()]),
        "stores": first["stores"],
        "codec_at_the_end": first["codec"],
    }


def table(arms: dict[str, dict[str, Any]], seeds: int) -> str:
    rows = []
    for name, arm in arms.items():
        sizes = ", ".join(f"{store['bytes'] / 1e6:.1f} (cut {store['cut']})" for store in arm["stores"])
        mean, sd = arm["accuracy_percent"]["mean"], arm["accuracy_percent"]["sd"]
        difference = arm["minus_exact_points"]
        pairs = (f"{difference['mean']:+.2f}", show_interval(difference["interval_95"]))
        rows.append((name, sizes, f"{mean:.2f} ± {sd:.2f}", *(("", "") if name == EXACT else pairs)))
    lines = markdown_table("codec | stores, MB | accuracy, % | minus fp32 | 95 % interval", rows)
    return "\n".join([f"DeiT-Tiny fine-tuned on CIFAR-10, {seeds} seeds", "", *lines]) + "\n"


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_run_options(parser)
    add_image_options(parser, rows=2000, size=96)
    parser.add_argument("--test_rows", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument(
        "--points", default="3:5,5:10", help="freeze points; all arms share the epochs before the first"
    )
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--weight_decay", type=float, default=0.05)
    options = parser.parse_args(argv)
    if options.smoke:
        options.rows, options.test_rows, options.image_size, options.seeds = 64, 50, 48, [0, 1]
        options.epochs, options.points = 3, "1:5,2:10"
    settle_run_options(options, NAME, options.jobs)
    return options


def main() -> None:
    options = parse_options()
    prepare(options)
    run_experiments(options, {NAME: run_seed}, collect)


if __name__ == "__main__":
    main()
