"""Training the live epochs of a seed, and one arm from their checkpoint."""

from __future__ import annotations

import argparse
import gc
import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments, set_seed

from hf_freezecache import FeatureStore, FreezeCacheConfig, FreezeCacheTrainer, ReplayableTransform
from hf_freezecache.cache.shards import file_sha256

from .._common import QUIET, silence
from ..finetune_caltech.arms import EpochClock, accuracy
from .experiments import Arm, Data, Experiment

CODEC = "int4"
SIMILARITY = "ssim"
LIVE = "live"


def train_live(
    experiment: Experiment, seed: int, data: Data, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Trains the epochs that all arms share, with plain `Trainer`, and leaves a checkpoint.

    Args:
        experiment: what to train.
        seed: of weights, order and augmentation.
        data: the images.
        folder: of this seed.
        options: the settings of the run.

    Returns:
        Its measurements; `weights` is the checkpoint's sha256, by which arms of one seed know each other.
    """
    shutil.rmtree(folder, ignore_errors=True)
    live = experiment.live_epochs
    clock = EpochClock(experiment.evaluate_every, {live}, stop_after=live)
    trainer = Trainer(**_arguments(experiment, None, seed, data, folder / LIVE, clock, options))
    silence(trainer).train()
    return {**_measured(clock), "weights": file_sha256(weights_file(experiment, data, folder))}


def train_arm(
    experiment: Experiment, arm: Arm, seed: int, data: Data, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Trains an arm from the checkpoint of the live epochs.

    Returns:
        Its measurements, with what its store takes.
    """
    target = folder / arm.name.replace(" ", "_")
    shutil.rmtree(target, ignore_errors=True)
    augmentation = {}
    if arm.views:
        # The naive way moves every channel alone.
        settings = {"similarity": SIMILARITY, "channel_map": not arm.flip}
        augmentation = {"sensitive_fraction": arm.sensitive_fraction, **settings}
    config = FreezeCacheConfig(
        policy="manual",
        freeze_points=f"{experiment.live_epochs}:{experiment.cut}",
        cache=arm.cache,
        codec=CODEC,
        views=arm.views,
        blocks=experiment.blocks,
        **augmentation,
    )
    clock = EpochClock(experiment.evaluate_every, set())
    trainer = FreezeCacheTrainer(
        **_arguments(experiment, arm, seed, data, target, clock, options), freeze_cache=config
    )
    silence(trainer).train(resume_from_checkpoint=str(weights_file(experiment, data, folder).parent))
    result = {**_measured(clock), "build_seconds": trainer.freeze_cache_report().totals.build_seconds}
    if arm.cache != "never":
        result["store"] = _describe(FeatureStore.open(trainer.freeze_status().store_path))
    del trainer
    gc.collect()
    shutil.rmtree(target, ignore_errors=True)
    return result


def weights_file(experiment: Experiment, data: Data, folder: Path) -> Path:
    """The weights in the checkpoint after the live epochs."""
    steps = -(-len(data.train) // experiment.batch_size) * experiment.live_epochs
    return folder / LIVE / f"checkpoint-{steps}" / "model.safetensors"


def _arguments(
    experiment: Experiment,
    arm: Arm | None,
    seed: int,
    data: Data,
    target: Path,
    clock: EpochClock,
    options: argparse.Namespace,
) -> dict[str, Any]:
    set_seed(seed)
    train = experiment.flip if arm is not None and arm.flip else experiment.train
    args = TrainingArguments(
        output_dir=str(target),
        num_train_epochs=experiment.live_epochs + experiment.frozen_epochs,
        per_device_train_batch_size=experiment.batch_size,
        per_device_eval_batch_size=100,
        learning_rate=experiment.learning_rate,
        lr_scheduler_type="cosine",
        **experiment.arguments,
        # `EpochClock` asks for evaluations and for the checkpoint.
        **QUIET,
        seed=seed,
    )
    return {
        "model": experiment.load_model(options),
        "args": args,
        "train_dataset": data.train.with_transform(ReplayableTransform(train=train, base=experiment.base)),
        "eval_dataset": data.test,
        "data_collator": experiment.collator,
        "compute_metrics": accuracy,
        "callbacks": [clock],
    }


def _measured(clock: EpochClock) -> dict[str, Any]:
    return {
        "accuracy": clock.evaluations[-1]["accuracy"],
        "curve": clock.evaluations,
        "epoch_seconds": clock.epoch_seconds,
        "setup_seconds": clock.setup_seconds,
        "eval_seconds": clock.eval_seconds,
    }


def _describe(store: FeatureStore) -> dict[str, Any]:
    channels = store.manifest.sensitive_channels
    return {
        "bytes_per_sample": store.bytes / len(store),
        "views": store.manifest.views,
        "sensitive_channels": None if channels is None else list(channels),
    }
