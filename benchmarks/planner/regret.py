"""What `cache="auto"` costs in small trainings, over the better of `always` and `never`.

python -m benchmarks.planner.regret
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import statistics
import tempfile
from typing import Any

import numpy as np
import torch
from datasets import Array3D, Dataset, Features, Value
from torch import nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer

from .._common import QUIET, Claim, in_turn, make_parser, pick, prepare, silence, write_result

CLASSES, SIDE = 5, 16
#: Median CPU seconds of `auto` over those of the better choice.
MOST_REGRET = 1.10
CACHES = ("auto", "always", "never")


def make_vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=SIDE,
        patch_size=4,
        num_labels=CLASSES,
    )
    return ViTForImageClassification(config)


def make_resnet() -> nn.Module:
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64], depths=[2, 2, 2], layer_type="basic", num_labels=CLASSES
    )
    return ResNetForImageClassification(config)


MODELS = {"vit": (make_vit, 5), "resnet": (make_resnet, 5)}
#: (rows, epochs after the freeze, loader processes) of the runs, each with every model.
RUNS = (
    *((128, 2, 0), (128, 12, 0), (256, 1.5, 0), (256, 3, 0), (256, 6, 0), (256, 15, 0), (512, 4, 0), (512, 10, 0)),
    *((256, 3, 2), (256, 10, 2)),
)


def make_rows(rows: int, seed: int) -> Dataset:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, CLASSES, rows)
    pixels = generator.normal(size=(rows, 3, SIDE, SIDE)).astype(np.float32) + labels[:, None, None, None] / 2
    columns = Features({"pixel_values": Array3D((3, SIDE, SIDE), "float32"), "labels": Value("int64")})
    return Dataset.from_dict({"pixel_values": pixels, "labels": labels}, features=columns).with_format("torch")


def train(
    name: str, images: Dataset, epochs: float, workers: int, cache: str, options: argparse.Namespace
) -> tuple[float, bool]:
    """CPU seconds of a training whose cut is frozen from the second epoch on, and whether it built a store."""
    torch.manual_seed(options.seed)
    make, cut = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        trainer = FreezeCacheTrainer(
            model=make(),
            args=TrainingArguments(
                output_dir=folder,
                num_train_epochs=1 + epochs,
                per_device_train_batch_size=options.batch_size,
                dataloader_num_workers=workers,
                seed=options.seed,
                **QUIET,
            ),
            train_dataset=images,
            freeze_cache=FreezeCacheConfig(policy="manual", freeze_points=f"1:{cut}", cache=cache),
        )
        gc.collect()
        start = cpu_seconds()
        silence(trainer).train()
        seconds = cpu_seconds() - start
        return seconds, any(phase.mode == "build" for phase in trainer.freeze_cache_report().phases)


def cpu_seconds() -> float:
    """Of this process and of the loader processes that have ended: what other programs take does not count."""
    return sum(os.times()[:4])


def measure(name: str, rows: int, epochs: float, workers: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run with every choice, several times in turn."""
    images = make_rows(rows, options.seed)
    seconds: dict[str, list[float]] = {cache: [] for cache in CACHES}
    built = []
    for number in range(options.rounds):
        for cache in in_turn(CACHES, number):
            spent, has_store = train(name, images, epochs, workers, cache, options)
            seconds[cache].append(spent)
            built += [has_store] if cache == "auto" else []
    medians = {cache: statistics.median(values) for cache, values in seconds.items()}
    best = min(("always", "never"), key=medians.__getitem__)
    result = {
        "model": name,
        "rows": rows,
        "epochs_after": epochs,
        "workers": workers,
        "seconds": medians,
        "built": built,
        "better": best,
        "regret": medians["auto"] / medians[best],
    }
    print({key: round(value, 3) if isinstance(value, float) else value for key, value in result.items()}, flush=True)
    return result


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    prepare(options)
    runs = [(name, *run) for name, run in itertools.product(MODELS, RUNS)]
    if options.smoke:
        options.rounds, runs = 1, [("vit", 64, 2, 0)]
    for name in MODELS:  # what the first training in a process takes is nobody's
        train(name, make_rows(64, options.seed), 1, 0, "always", options)
    results = [measure(*run, options) for run in runs]
    regrets = [result["regret"] for result in results]
    right = statistics.mean(built == (result["better"] == "always") for result in results for built in result["built"])
    print(f"regret: median {statistics.median(regrets):.3f}, largest {max(regrets):.3f}; right {right:.0%}")
    write_result(
        "planner",
        options,
        settings=pick(options, "seed batch_size rounds"),
        results={"runs": results, "share_of_right_choices": right},
        claims=[Claim("CPU seconds, auto / the better: median", statistics.median(regrets), at_most=MOST_REGRET)],
        file="regret.json",
    )


if __name__ == "__main__":
    main()
