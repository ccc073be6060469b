"""The ways to train that are compared, and one training of one of them."""

from __future__ import annotations

import argparse
import gc
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer
from hf_freezecache.training.flops import measure_training_flops

from .._common import QUIET, silence
from .._trainings import EpochClock, accuracy
from .tasks import ADAPTED, RATES_OF_FEW, Task

ON_GPU = {"use_cpu": False, "bf16": True, "dataloader_pin_memory": True}
#: Epochs of a head start.
HEAD_START = 2


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        name: in tables and files.
        epochs: of the training, in units of `Task.epochs`.
        head_start: epochs of the head alone before it.
        points: freeze points, with `half` and `deep` for the task's cuts and `all` for all blocks; None: none.
        cache: of `FreezeCacheConfig`.
        settings: further ones.
        lora: whether the model's own weights are frozen and low-rank matrices are trained beside them.
        tuned_as: the arm whose learning rate it has; "": its own.
        is_core: whether every task has it, not only those with all arms.
    """

    name: str
    epochs: int
    head_start: int = 0
    points: str | None = None
    cache: str = "always"
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    lora: bool = False
    tuned_as: str = ""
    is_core: bool = False

    @property
    def is_plain(self) -> bool:
        return self.points is None and not self.settings and not self.lora

    def suits(self, task: Task) -> bool:
        """Whether it can be trained: what keeps pretrained weights needs some."""
        keeps = self.head_start or self.lora or self.points == "0:all" or "layer_decay" in self.settings
        return task.is_pretrained or not keeps

    def rates(self, task: Task) -> tuple[float, ...]:
        """Learning rates that are tried."""
        return RATES_OF_FEW if self.lora or self.points == "0:all" else task.rates

    def config(self, task: Task) -> FreezeCacheConfig:
        """The settings of `FreezeCacheTrainer`."""
        schedule: dict[str, Any] = {"policy": "none"}
        if self.points is not None:
            start, cut = self.points.split(":")
            cuts = {"half": task.half, "deep": task.deep, "all": task.blocks}
            schedule = {"policy": "manual", "freeze_points": f"{int(start) * task.epochs}:{cuts[cut]}"}
        return FreezeCacheConfig(
            **{**schedule, "head_start_epochs": self.head_start, "cache": self.cache, **self.settings}
        )


def make_arms() -> list[Arm]:
    """All arms, in the order in which they are trained: where time is short, the last ones are left out."""
    half, deep = "half from 0 of 4", "deep from 2 of 4, head start"
    started = "head start"
    return [
        *(Arm(f"plain {epochs}", epochs, is_core=True) for epochs in (12, 6, 4, 3)),
        Arm(half, 4, 0, "0:half", is_core=True),
        Arm("auto of 4", 4, settings={"policy": "auto"}, is_core=True),
        Arm("linear of 4", 4, settings={"policy": "linear"}, is_core=True),
        *(Arm(f"plain {epochs}, {started}", epochs, HEAD_START, is_core=epochs in (4, 6)) for epochs in (6, 4)),
        Arm(f"{half}, {started}", 4, HEAD_START, "0:half", is_core=True),
        Arm(deep, 4, HEAD_START, "2:deep", is_core=True),
        Arm(f"auto of 4, {started}", 4, HEAD_START, settings={"policy": "auto"}, is_core=True),
        Arm("linear of 12", 12, settings={"policy": "linear"}, is_core=True),
        Arm("auto of 12", 12, settings={"policy": "auto"}),
        Arm("LoRA 12", 12, lora=True),
        Arm("deep from 0 of 4", 4, 0, "0:deep", is_core=True),
        Arm("linear probe 12", 12, points="0:all"),
        Arm("layer decay 0.75 of 4", 4, settings={"layer_decay": 0.75}),
        Arm(f"plain 3, {started}", 3, HEAD_START),
        Arm(f"linear of 4, {started}", 4, HEAD_START, settings={"policy": "linear"}, is_core=True),
        Arm(f"{half}, frozen only", 4, 0, "0:half", cache="never", tuned_as=half),
        Arm(f"{deep}, frozen only", 4, HEAD_START, "2:deep", cache="never", tuned_as=deep),
        Arm(f"{deep}, annealed", 4, HEAD_START, "2:deep", settings={"anneal": "cosine"}),
        Arm(f"plain 12, {started}", 12, HEAD_START),
    ]


def train_arm(
    arm: Arm, rate: float, seed: int, task: Task, train: Dataset, test: Dataset, options: argparse.Namespace
) -> dict[str, Any]:
    """Trains one arm and returns its measurements.

    Args:
        arm: what to train.
        rate: the learning rate.
        seed: of the head, the order of the samples and the dropout.
        task: what is learned.
        train: samples to learn from.
        test: samples to evaluate, once, at the end.
        options: the settings.
    """
    target = Path(options.output_dir) / "trainings" / f"{task.name}-{arm.name}-{rate:g}-{seed}".replace(" ", "_")
    shutil.rmtree(target, ignore_errors=True)
    set_seed(seed)
    model = task.load_model()
    clock = EpochClock(arm.epochs * task.epochs, set())
    kwargs: dict[str, Any] = {
        "args": make_args(task, target, options, arm.epochs * task.epochs, rate, seed),
        "train_dataset": train,
        "eval_dataset": test,
        "data_collator": task.collator,
        "compute_metrics": accuracy,
        "callbacks": [clock],
    }
    if arm.lora:
        model = get_peft_model(
            model, LoraConfig(r=16, lora_alpha=16, target_modules=ADAPTED, modules_to_save=["classifier"])
        )
    if arm.is_plain and not arm.head_start or arm.lora:
        trainer = Trainer(model, **kwargs)
    else:
        trainer = FreezeCacheTrainer(model, **kwargs, freeze_cache=arm.config(task))
    if options.gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    silence(trainer).train()
    seconds = time.perf_counter() - start - clock.eval_seconds
    result = {
        "learning_rate": rate,
        "accuracy": clock.evaluations[-1]["accuracy"],
        "seconds": seconds,
        "setup_seconds": clock.setup_seconds,
        "epoch_seconds": clock.epoch_seconds,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if options.gpu else None,
    }
    if isinstance(trainer, FreezeCacheTrainer):
        report = trainer.freeze_cache_report()
        result |= {
            "flops": report.totals.flops,
            "build_seconds": report.totals.build_seconds,
            "head_start_seconds": report.totals.head_start_seconds,
            "trial_seconds": report.totals.trial_seconds,
            # Every phase begins to count anew.
            "peak_gpu_bytes": report.totals.peak_memory_bytes if options.gpu else None,
            "phases": report.to_dict()["phases"],
        }
        result["why"] = getattr(trainer._freeze_policy, "why", None)
    else:
        result["flops"] = _flops_of_a_sample(trainer, task, train) * len(train) * arm.epochs * task.epochs
    del trainer, model
    gc.collect()
    shutil.rmtree(target, ignore_errors=True)
    return result


def _flops_of_a_sample(trainer: Trainer, task: Task, train: Dataset) -> float:
    """FLOPs of a step of plain training, by sample; of texts the mean over the batches of an epoch."""

    def measure(batch: Mapping[str, torch.Tensor]) -> int:
        return measure_training_flops(trainer.model, trainer._prepare_inputs(dict(batch)))

    batch = task.collator(_fetch(train, range(2)))
    if "input_ids" not in batch:
        return measure(batch)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    batches = [task.collator(_fetch(train, rows.tolist())) for rows in order.split(task.batch_size)]
    by_width = {batch["input_ids"].shape[1]: {name: rows[:2] for name, rows in batch.items()} for batch in batches}
    # Attention grows with the square of the width, everything else with it.
    widths = sorted(by_width)
    probed = sorted({widths[0], widths[len(widths) // 2], widths[-1]})
    curve = np.polyfit(probed, [measure(by_width[width]) for width in probed], len(probed) - 1)
    seen = [(batch["input_ids"].shape[1], len(batch["input_ids"])) for batch in batches]
    return float(sum(np.polyval(curve, width) * rows for width, rows in seen) / len(train))


def _fetch(dataset: Any, rows: Iterable[int]) -> Any:
    return dataset.__getitems__(list(rows)) if hasattr(dataset, "__getitems__") else [dataset[row] for row in rows]


def make_args(
    task: Task, target: Path, options: argparse.Namespace, epochs: int, rate: float, seed: int
) -> TrainingArguments:
    """What all trainings of a task share: AdamW, cosine with warm-up; `EpochClock` asks for evaluations."""
    return TrainingArguments(
        output_dir=str(target),
        num_train_epochs=epochs,
        per_device_train_batch_size=task.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.05,
        **{**QUIET, **(ON_GPU if options.gpu else {})},
        seed=seed,
    )
