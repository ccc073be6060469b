"""On the GPU: does replay give the losses of freeze-only, and what does a whole short training take?"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from datasets import Dataset
from sklearn.datasets import load_digits
from torch import nn
from torchvision.transforms import v2
from transformers import Trainer, TrainingArguments, set_seed

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer

from .._common import QUIET, silence
from .._images import FINISH, as_batch
from .._trainings import accuracy
from .workload import Bench, Setting, image_size, make_model, synchronize, use_gpu

# Replay against freeze-only


class RecordingTrainer(FreezeCacheTrainer):
    """Keeps the loss of every step; a rehearsal's, before the step, is replaced by the step's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses: dict[int, torch.Tensor] = {}

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses[self.state.global_step] = loss.detach().clone()
        return loss


@contextlib.contextmanager
def deterministic(algorithms: str) -> Iterator[None]:
    """Inside, torch uses deterministic algorithms. cuBLAS needs `CUBLAS_WORKSPACE_CONFIG`, which `run.py` sets.

    Args:
        algorithms: `any`, `deterministic`, or `deterministic_where_possible`, for models with an operation that has
            no deterministic kernel (max pooling, backward).
    """
    torch.use_deterministic_algorithms(algorithms != "any", warn_only=algorithms == "deterministic_where_possible")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_equality(
    model: str, bf16: bool, algorithms: str, options: argparse.Namespace, publish: Callable[[dict[str, Any]], None]
) -> None:
    """Two epochs freeze-only and two replayed from an fp32 store, the same seed; publishes how far they differ.

    Freeze-only runs twice: what its own repetition differs by is no difference of the cache.

    Args:
        model: its name.
        bf16: autocast to bf16; else float32.
        algorithms: see `deterministic`.
        options: seed and sizes.
        publish: takes the result.
    """
    batch_size, steps = (4, 4) if options.smoke else (32, 8)
    small = argparse.Namespace(**{**vars(options), "steps": steps})
    with tempfile.TemporaryDirectory() as folder, deterministic(algorithms):
        bench = Bench(Setting(model, batch_size, 0.75, "fp32"), small, Path(folder), rows=batch_size * steps // 2)
        runs = {
            name: _record(bench, cache, bf16)
            for name, cache in (("freeze_only", "never"), ("repeated", "never"), ("replay", "always"))
        }
    first = runs["freeze_only"]
    publish(
        {
            "model": model,
            "bf16": bf16,
            "algorithms": algorithms,
            "cut": bench.cut,
            "steps": steps,
            "losses": {name: run["losses"] for name, run in runs.items()},
            "all_finite": all(math.isfinite(loss) for run in runs.values() for loss in run["losses"]),
            "replay_against_freeze_only": differences(first, runs["replay"]),
            "freeze_only_against_itself": differences(first, runs["repeated"]),
            "replayed": runs["replay"]["replayed"],
        }
    )


def _record(bench: Bench, cache: str, bf16: bool) -> dict[str, Any]:
    set_seed(bench.options.seed)
    trainer = RecordingTrainer(
        model=copy.deepcopy(bench.model),
        args=bench.arguments(bf16=bf16),
        train_dataset=bench.images,
        data_collator=as_batch,
        freeze_cache=bench.config(cache),
    )
    silence(trainer).train()
    return {
        "losses": [loss.item() for _, loss in sorted(trainer.losses.items())],
        "weights": {name: value.detach().cpu() for name, value in trainer.model.state_dict().items()},
        "replayed": trainer.freeze_status().replaying,
    }


def differences(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Largest differences of losses and of weights after the training, and whether there is none."""
    losses = [abs(a - b) for a, b in zip(first["losses"], second["losses"], strict=True)]
    weights = [
        (value.double() - second["weights"][name].double()).abs().max().item()
        for name, value in first["weights"].items()
    ]
    return {
        "first_loss": losses[0],
        "largest_of_losses": max(losses),
        "largest_of_weights": max(weights),
        "bit_equal": max(losses) == 0 and max(weights) == 0,
    }


# A whole training


def load_splits(options: argparse.Namespace) -> dict[str, Dataset]:
    """scikit-learn's 1,797 handwritten digits as images of 8x8 pixels, four fifths of them for training."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(options.seed)).tolist()
    order = order[:40] if options.smoke else order
    images = [PIL.Image.fromarray((digits.images[row] * 255 / 16).astype("uint8")) for row in order]
    rows = Dataset.from_dict({"image": images, "label": [int(digits.target[row]) for row in order]})
    count = len(rows) * 4 // 5
    return {"train": rows.select(range(count)), "test": rows.select(range(count, len(rows)))}


class Resize:
    """Images in every row to the model's size.

    Args:
        size: pixels of a side.
    """

    def __init__(self, size: int):
        self.pipeline = v2.Compose([v2.ToImage(), v2.Resize((size, size), antialias=True), *FINISH])

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        images = [self.pipeline(image.convert("RGB")) for image in rows["image"]]
        return {"pixel_values": images, "labels": rows["label"]}


class Messages(logging.Handler):
    """Keeps what the library says."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname}: {record.getMessage()}")


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """Yields the list to which the library's messages go."""
    logger, messages = logging.getLogger("hf_freezecache"), Messages()
    level = logger.level
    logger.addHandler(messages)
    logger.setLevel(logging.INFO)
    try:
        yield messages.lines
    finally:
        logger.removeHandler(messages)
        logger.setLevel(level)


def train_arm(model: nn.Module, arm: str, splits: dict[str, Dataset], options: argparse.Namespace) -> dict[str, Any]:
    """Trains one arm: `plain` is `Trainer`, the others are values of `cache` with the default policy."""
    transform = Resize(image_size(options.smoke))
    with tempfile.TemporaryDirectory() as folder, listening() as messages:
        args = TrainingArguments(
            output_dir=folder,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=16 if options.smoke else 64,
            learning_rate=3e-4,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            weight_decay=0.05,
            seed=options.seed,
            dataloader_num_workers=options.workers,
            dataloader_persistent_workers=options.workers > 0,
            # A loss that is not finite must show.
            logging_nan_inf_filter=False,
            **{
                **QUIET,
                "logging_strategy": "epoch",
                "bf16": True,
                "use_cpu": not use_gpu(),
                "dataloader_pin_memory": use_gpu(),
            },
        )
        common = dict(
            model=copy.deepcopy(model),
            args=args,
            train_dataset=splits["train"].with_transform(transform),
            eval_dataset=splits["test"].with_transform(transform),
            compute_metrics=accuracy,
        )
        if arm == "plain":
            trainer = Trainer(**common)
        else:
            trainer = FreezeCacheTrainer(**common, freeze_cache=FreezeCacheConfig(cache=arm))
        gc.collect()  # loader processes of the arm before end now, not while this one is timed
        synchronize()
        start = time.perf_counter()
        silence(trainer).train()
        synchronize()
        seconds = time.perf_counter() - start
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        result = {
            "seconds": seconds,
            "losses": losses,
            "losses_finite": all(math.isfinite(loss) for loss in losses),
            "accuracy": trainer.evaluate()["eval_accuracy"],
            "messages": messages,
        }
        if isinstance(trainer, FreezeCacheTrainer):
            result["report"] = asdict(trainer.freeze_cache_report())
        return result


def compare_trainings(
    model: str,
    arms: tuple[str, ...],
    options: argparse.Namespace,
    seconds_left: Callable[[], float],
    publish: Callable,
) -> None:
    """Trains every arm from the same weights on the digits, and publishes after each.

    Args:
        model: its name.
        arms: `plain` and values of `cache`.
        options: epochs, workers and seed.
        seconds_left: of this task; no arm starts that would take longer than the longest before.
        publish: takes the result so far.
    """
    set_seed(options.seed)
    weights, splits = make_model(model, options.smoke), load_splits(options)
    result: dict[str, Any] = {"model": model, "images": len(splits["train"]), "epochs": options.epochs, "arms": {}}
    longest = 0.0
    for arm in arms:
        if seconds_left() < longest:
            result.setdefault("skipped", []).append(
                f"{arm}: {seconds_left():.0f} s left, one arm took {longest:.0f} s"
            )
            continue
        start = time.perf_counter()
        result["arms"][arm] = train_arm(weights, arm, splits, options)
        longest = max(longest, time.perf_counter() - start)
        plain = result["arms"].get("plain")
        if plain is not None:
            result["arms"][arm]["speedup_over_plain"] = plain["seconds"] / result["arms"][arm]["seconds"]
        publish(result)
