"""What `plan` predicts against what a training then takes; what deciding costs where a store does not pay; the budget.

python -m benchmarks.planner.run
"""

from __future__ import annotations

import argparse
import copy
import gc
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from torchvision.transforms import v2
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    TrainingArguments,
)

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer, ReplayableTransform, plan
from hf_freezecache.cli.images import ImageCollator
from hf_freezecache.estimate.costs import PlanRow

from .._common import QUIET, Claim, in_turn, make_parser, pick, prepare, silence, summary, write_result
from .._images import CLASSES, FINISH, add_image_options, load_caltech_files

#: Largest error of a prediction, as a share of what was measured.
LIMITS = {"bytes": 0.02, "build_seconds": 0.25, "replay_step_seconds": 0.25}
#: Seconds of a training in which a store does not pay, over those of one that never asks.
MOST_OVERHEAD = 1.02
AS_BATCH = ImageCollator("label")


def make_resnet() -> nn.Module:
    """ResNet-18."""
    config = ResNetConfig(
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        num_labels=CLASSES,
    )
    return ResNetForImageClassification(config)


def make_convnext() -> nn.Module:
    """Half as wide and deep as ConvNeXt-Tiny."""
    config = ConvNextConfig(hidden_sizes=[48, 96, 192, 384], depths=[2, 2, 6, 2], num_labels=CLASSES)
    return ConvNextForImageClassification(config)


def make_swin(size: int = 96) -> nn.Module:
    """Three stages, windows of 6 x 6."""
    config = SwinConfig(
        image_size=size,
        patch_size=4,
        embed_dim=64,
        depths=[2, 2, 4],
        num_heads=[2, 4, 8],
        window_size=6,
        num_labels=CLASSES,
    )
    return SwinForImageClassification(config)


#: Name -> (how the model is made, cuts that are compared). Random weights: they change no cost.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (make_resnet, (5, 7)),
    "convnext": (make_convnext, (7,)),
    "swin": (make_swin, (5,)),
}


def load_images(options: argparse.Namespace) -> Dataset:
    """Caltech-101 as files: decoded, cropped and flipped whenever a row is read."""
    rows, size = load_caltech_files(options, "train", options.rows), options.image_size
    train = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomResizedCrop(size, scale=(0.35, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            *FINISH,
        ]
    )
    base = v2.Compose([v2.ToImage(), v2.Resize((size, size), antialias=True), *FINISH])
    return rows.with_transform(ReplayableTransform(train=train, base=base))


def make_args(folder: str, epochs: float, options: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=options.batch_size,
        learning_rate=1e-4,
        **QUIET,
        seed=options.seed,
    )


def make_config(points: str, options: argparse.Namespace, **settings) -> FreezeCacheConfig:
    return FreezeCacheConfig(
        policy="manual",
        freeze_points=points,
        views=1,
        sensitivity_batches=options.sensitivity_batches,
        **settings,
    )


def train(
    model: nn.Module, images: Dataset, folder: str, epochs: int, config: FreezeCacheConfig, options: argparse.Namespace
) -> tuple[FreezeCacheTrainer, float]:
    """Trains a copy of the model; the trainer and the seconds."""
    trainer = FreezeCacheTrainer(
        model=copy.deepcopy(model),
        args=make_args(folder, epochs, options),
        train_dataset=images,
        data_collator=AS_BATCH,
        freeze_cache=config,
    )
    gc.collect()
    start = time.perf_counter()
    silence(trainer).train()
    return trainer, time.perf_counter() - start


# Predicted and measured


def predict(model: nn.Module, cuts: tuple[int, ...], images: Dataset, options: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        costs = plan(
            copy.deepcopy(model),
            images,
            make_config(f"0:{cuts[0]}", options),
            args=make_args(folder, 1, options),
            data_collator=AS_BATCH,
            cuts=cuts,
            batches=options.batches,
        )
        seconds = time.perf_counter() - start
    print(costs, flush=True)
    return {"rows": {row.cut: row for row in costs.rows}, "seconds": seconds, "live_step": costs.live_step_seconds}


def measure(model: nn.Module, cut: int, images: Dataset, options: argparse.Namespace) -> dict[str, float]:
    """Bytes and seconds of a training with this cut, from its own report."""
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(f"0:{cut}", options, cache="always")
        trainer, _ = train(model, images, folder, options.replay_epochs, config, options)
        phases = {phase.mode: phase for phase in trainer.freeze_cache_report().phases}
    build, replay = phases["build"], phases["replay"]
    return {
        "bytes": build.store_bytes,
        "build_seconds": build.seconds,
        "replay_step_seconds": replay.seconds / replay.steps,
    }


def compare(name: str, images: Dataset, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Predictions and trainings in turn."""
    make, cuts = MODELS[name]
    model, cuts = make(), cuts[: options.cuts]
    predicted: dict[int, list[PlanRow]] = {cut: [] for cut in cuts}
    measured: dict[int, list[dict]] = {cut: [] for cut in cuts}
    seconds, plain = [], []
    for number in range(options.rounds):
        for side in in_turn(("plan", "train"), number):
            if side == "plan":
                prediction = predict(model, cuts, images, options)
                seconds.append(prediction["seconds"])
                plain.append(prediction["live_step"])
                for cut in cuts:
                    predicted[cut].append(prediction["rows"][cut])
            else:
                for cut in cuts:
                    measured[cut].append(measure(model, cut, images, options))
    results = []
    for cut in cuts:
        result = {"model": name, "cut": cut, "plain_step_seconds": summary(plain), "plan_seconds": summary(seconds)}
        for what in LIMITS:
            prediction = summary([getattr(row, what) for row in predicted[cut]])
            outcome = summary([values[what] for values in measured[cut]])
            first, second = prediction["median"], outcome["median"]
            result[what] = {"predicted": prediction, "measured": outcome, "ratio": first / second}
            print(f"{name}, cut {cut}, {what}: predicted {first:.4g}, measured {second:.4g}", flush=True)
        result["verdict"] = predicted[cut][-1].verdict
        results.append(result)
    return results


# What deciding costs


def decline(images: Dataset, options: argparse.Namespace) -> dict[str, Any]:
    """A training whose stem alone is frozen, with `auto` and with `never`: its features are large and cheap."""
    model = make_resnet()
    points = f"{options.epochs - options.epochs_left}:1"
    seconds: dict[str, list[float]] = {"never": [], "auto": []}
    built = 0
    for number in range(options.pairs):
        for cache in in_turn(seconds, number):
            with tempfile.TemporaryDirectory() as folder:
                config = make_config(points, options, cache=cache)
                trainer, spent = train(model, images, folder, options.epochs, config, options)
                built += any(phase.store_bytes for phase in trainer.freeze_cache_report().phases)
            seconds[cache].append(spent)
            print(f"{cache}: {spent:.2f} s", flush=True)
    ratios = [auto / never for auto, never in zip(seconds["auto"], seconds["never"], strict=True)]
    return {
        "points": points,
        **{name: summary(values) for name, values in seconds.items()},
        "ratio": summary(ratios),
        "stores_built": built,
    }


# The budget


@contextmanager
def watching(folder: Path) -> Iterator[list[int]]:
    """Notes the bytes of all files in a folder, again and again."""
    sizes, stop = [0], threading.Event()

    def look() -> None:
        while not stop.is_set():
            sizes.append(folder_bytes(folder))
            stop.wait(0.005)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield sizes
    finally:
        stop.set()
        thread.join()
        sizes.append(folder_bytes(folder))


def folder_bytes(folder: Path) -> int:
    """Bytes of all files; one that is deleted in the meantime counts nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def keep_budget(images: Dataset, options: argparse.Namespace) -> dict[str, Any]:
    """A training with half of the bytes that its first store would take, and a second, deeper store after it."""
    model = make_resnet()
    first, second = 5, 7
    needed = predict(model, (first,), images, options)["rows"][first].bytes
    budget = needed // 2
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as stores:
        config = make_config(
            f"0:{first},1:{second}", options, cache="always", cache_budget=str(budget), feature_cache_dir=stores
        )
        with watching(Path(stores)) as sizes:
            trainer, _ = train(model, images, folder, 2, config, options)
        phases = trainer.freeze_cache_report().to_dict()["phases"]
    return {
        "needed_bytes": needed,
        "budget_bytes": budget,
        "largest_seen": max(sizes),
        "after": sizes[-1],
        "looks": len(sizes),
        "phases": phases,
    }


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=("predict", "decline", "budget"))
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--cuts", type=int, default=2, help="largest number of cuts of a model")
    add_image_options(parser, rows=320, size=96, batch_size=16)
    parser.add_argument("--batches", type=int, default=3, help="batches that a plan measures")
    parser.add_argument("--sensitivity_batches", type=int, default=8)
    parser.add_argument("--replay_epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="predictions and trainings of every cut")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of a training whose store does not pay")
    parser.add_argument("--epochs_left", type=int, default=3, help="how many of these epochs follow the freeze")
    parser.add_argument(
        "--pairs", type=int, default=3, help="such trainings with cache=auto, and as many with cache=never"
    )
    options = parser.parse_args(argv)
    options.parts = options.parts or ["predict", "decline", "budget"]
    if options.smoke:
        options.models, options.cuts, options.rows, options.batch_size = ["resnet18"], 1, 32, 8
        options.rounds, options.pairs, options.sensitivity_batches, options.batches = 1, 1, 2, 1
    return options


def main() -> None:
    options = parse_options()
    prepare(options)
    images = load_images(options)
    results: dict[str, Any] = {}
    claims: list[Claim] = []
    if "predict" in options.parts:
        results["predict"] = [result for name in options.models for result in compare(name, images, options)]
        for result in results["predict"]:
            for what, limit in LIMITS.items():
                text = f"{result['model']}, cut {result['cut']}: error of the predicted {what}"
                claims.append(Claim(text, abs(result[what]["ratio"] - 1), at_most=limit))
    if "decline" in options.parts:
        results["decline"] = outcome = decline(images, options)
        text = "seconds of a training whose store does not pay, auto / never"
        claims.append(Claim(text, outcome["ratio"]["median"], at_most=MOST_OVERHEAD))
        claims.append(Claim("stores that it built", outcome["stores_built"], at_most=0))
    if "budget" in options.parts:
        results["budget"] = outcome = keep_budget(images, options)
        text = "most bytes of stores at any moment / budget"
        claims.append(Claim(text, outcome["largest_seen"] / outcome["budget_bytes"], at_most=1.0))
    names = (
        "models image_size batch_size rows batches sensitivity_batches replay_epochs rounds epochs epochs_left pairs"
    )
    write_result("planner", options, pick(options, names), results, claims)


if __name__ == "__main__":
    main()
