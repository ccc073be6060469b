"""The arms of the experiment, and training one of them."""

from __future__ import annotations

import argparse
import gc
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments, set_seed

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer
from hf_freezecache.training.flops import measure_training_flops

from .._common import QUIET, silence
from .._images import Pixels, as_interpolated_batch, load_caltech, load_deit
from .._trainings import EpochClock, accuracy

PLAIN = "plain"
PROBE = "linear probe"
#: The chain of DeiT-Tiny: stem and 12 blocks. With all of them frozen only the head trains.
ALL_BLOCKS = 13
ON_GPU = {"use_cpu": False, "bf16": True, "dataloader_pin_memory": True}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        name: in tables and files.
        points: freeze points; None is plain `Trainer`.
        cache: of `FreezeCacheConfig`.
        branch: epochs that are shared with the plain arm: training resumes from its checkpoint.
        config: whole settings in place of these; they freeze nothing.
    """

    name: str
    points: str | None = None
    cache: str = "never"
    branch: int = 0
    config: FreezeCacheConfig | None = None


def make_arms(options: argparse.Namespace) -> list[Arm]:
    """The plain arm, then per schedule freeze-only and cached, then the linear probe."""
    arms = [Arm(PLAIN)]
    for points in options.schedules:
        branch = int(points.split(":")[0])
        arms += [Arm(freeze_only(points), points, "never", branch), Arm(cached(points), points, "always", branch)]
    return [*arms, Arm(PROBE, f"0:{ALL_BLOCKS}", "always")]


def freeze_only(points: str) -> str:
    return f"freeze-only {points}"


def cached(points: str) -> str:
    return f"cached {points}"


@dataclass(frozen=True)
class Data:
    """All images, preprocessed once."""

    train: Pixels
    test: Pixels

    @classmethod
    def load(cls, options: argparse.Namespace) -> Data:
        return cls(
            load_caltech(options, "train", options.image_size, options.rows),
            load_caltech(options, "test", options.image_size, options.test_rows),
        )


def make_args(arm: Arm, seed: int, folder: Path, options: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=options.probe_learning_rate if arm.name == PROBE else options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        # `EpochClock` asks for evaluations and checkpoints.
        **{**QUIET, **(ON_GPU if options.gpu else {})},
        seed=seed,
    )


def train_arm(
    arm: Arm,
    seed: int,
    data: Data,
    folder: Path,
    plain: dict[str, Any] | None,
    options: argparse.Namespace,
    stop_after: int | None = None,
) -> dict[str, Any]:
    """Trains one arm and returns its measurements.

    Args:
        arm: what to train.
        seed: of the head, the order of the samples and the dropout.
        data: the images.
        folder: of this seed; the plain arm leaves its checkpoints there.
        plain: what this function returned for the plain arm of the seed; None for that arm.
        options: the settings.
        stop_after: epochs after which the training stops, its schedule being that of all epochs.
    """
    set_seed(seed)
    steps = -(-len(data.train) // options.batch_size)
    branches = {other.branch for other in make_arms(options)} - {0}
    clock = EpochClock(options.evaluate_every, branches if plain is None else set(), stop_after)
    target = folder / arm.name.replace(" ", "_").replace(":", "-")
    kwargs = {
        "model": load_deit(options),
        "args": make_args(arm, seed, target, options),
        "train_dataset": data.train,
        "eval_dataset": data.test,
        "data_collator": as_interpolated_batch,
        "compute_metrics": accuracy,
        "callbacks": [clock],
    }
    if arm.points is None and arm.config is None:
        trainer = Trainer(**kwargs)
        probe = trainer._prepare_inputs(as_interpolated_batch(data.train.__getitems__(range(2))))
        flops_per_epoch = measure_training_flops(trainer.model, probe) * len(data.train)
    else:
        manual = {"policy": "manual", "freeze_points": arm.points, "cache": arm.cache, "codec": options.codec}
        trainer = FreezeCacheTrainer(**kwargs, freeze_cache=arm.config or FreezeCacheConfig(**manual))
    checkpoint = checkpoint_folder(folder, arm.branch * steps) if arm.branch else None
    silence(trainer).train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    result = {"seed": seed, "arm": arm.name, "branch": arm.branch, **_times(arm, clock, plain)}
    if arm.points is None and arm.config is None:
        result |= {"build_seconds": 0.0, "flops_per_epoch": flops_per_epoch, "flops": flops_per_epoch * options.epochs}
    else:
        report = trainer.freeze_cache_report()
        result["build_seconds"] = report.totals.build_seconds
        result["flops"] = report.totals.flops + (plain["flops_per_epoch"] * arm.branch if arm.branch else 0.0)
        result["ledger_seconds"] = report.totals.train_seconds + report.totals.build_seconds
        result["phases"] = report.to_dict()["phases"]
        shutil.rmtree(target, ignore_errors=True)
    del trainer, kwargs
    gc.collect()
    return result


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Where the plain arm leaves the checkpoint of a step."""
    return folder / PLAIN / f"checkpoint-{step}"


def _times(arm: Arm, clock: EpochClock, plain: dict[str, Any] | None) -> dict[str, Any]:
    """The run as if it had been made alone: the plain arm's seconds of the shared epochs come first."""
    shared = plain["epoch_seconds"][: arm.branch] if arm.branch else []
    epoch_seconds = [*shared, *clock.epoch_seconds]
    evaluations = [point for point in plain["curve"] if point["epoch"] <= arm.branch] if arm.branch else []
    for point in clock.evaluations:
        evaluations.append({**point, "seconds": sum(epoch_seconds[: point["epoch"]])})
    return {
        "epoch_seconds": epoch_seconds,
        "train_seconds": sum(epoch_seconds),
        "own_seconds": sum(clock.epoch_seconds),
        "setup_seconds": clock.setup_seconds,
        "eval_seconds": clock.eval_seconds,
        "curve": evaluations,
        "accuracy": evaluations[-1]["accuracy"],
    }
