"""One training of one method, on features of a store that all trainings of a task share."""

from __future__ import annotations

import argparse
import gc
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments, set_seed

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer, ZeroOrderConfig, ZeroOrderTrainer

from .._common import QUIET, silence
from .._trainings import accuracy
from ..headline.tasks import Task
from .jobs import Job, Result
from .methods import METHODS
from .tasks import TASKS

#: Epochs of the head start, and its learning rate.
HEAD_EPOCHS, HEAD_RATE = 1, 1e-3
#: Losses of a curve.
POINTS = 25
#: Features are kept as half-precision numbers.
CODEC = "fp16"


class PlainStochasticGradients(FreezeCacheTrainer):
    """Follows the exact gradient, without momentum."""

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": self.args.learning_rate})
        return super().create_optimizer(*args, **kwargs)


def run_job(job: Job, task: Task, options: argparse.Namespace) -> Result:
    """Runs one job and returns its measurements.

    Args:
        job: what to do.
        task: what is learned, with its data in memory.
        options: the settings.
    """
    target = Path(options.output_dir) / "trainings" / job.file.removesuffix(".json")
    shutil.rmtree(target, ignore_errors=True)
    train, test = task.split() if job.is_tuning else (task.train, task.test)
    set_seed(job.seed)
    model = task.load_model()
    result = prepare(job, task, model, train, test, target, options) if not job.method else None
    if result is None:
        if job.start == "head start":
            load_head(model, head_file(job, options))
        result = train_method(job, task, model, train, test, target, options)
    del model
    gc.collect()
    shutil.rmtree(target, ignore_errors=True)
    return result


def head_file(job: Job, options: argparse.Namespace) -> Path:
    """Where the head of a seed is kept."""
    name = f"{job.task}-{job.seed}{'-tuning' if job.is_tuning else ''}.pt"
    return Path(options.output_dir) / "heads" / name


def load_head(model: torch.nn.Module, path: Path) -> None:
    """Puts the weights that a head start has changed into a model."""
    state = torch.load(path, weights_only=True)
    missing = model.load_state_dict(state, strict=False).unexpected_keys
    assert not missing, f"the head has other weights than the model: {missing}"


def prepare(
    job: Job,
    task: Task,
    model: torch.nn.Module,
    train: Dataset,
    test: Dataset,
    target: Path,
    options: argparse.Namespace,
) -> Result:
    """Makes the store, if it is not there, and keeps the head of a head start; the rest does not learn."""
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    args = make_args(job, task, target, options, steps=1)
    config = make_config(task, options, head_start_epochs=HEAD_EPOCHS, head_start_lr=HEAD_RATE)
    trainer = PlainStochasticGradients(
        model, args, train_dataset=train, eval_dataset=test, compute_metrics=accuracy, freeze_cache=config,
        data_collator=task.collator,
    )  # fmt: skip
    start = time.perf_counter()
    silence(trainer).train()
    seconds = time.perf_counter() - start
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    changed = {name: value.clone() for name, value in state.items() if not torch.equal(value, before[name].cpu())}
    path = head_file(job, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(changed, path)
    return {
        "seconds": seconds,
        "head": sorted(changed),
        "store_bytes": trainer.freeze_status().store_bytes,
        "accuracy": trainer.evaluate()["eval_accuracy"],
    }


def train_method(
    job: Job,
    task: Task,
    model: torch.nn.Module,
    train: Dataset,
    test: Dataset,
    target: Path,
    options: argparse.Namespace,
) -> Result:
    """Trains with a method and evaluates once, at the end."""
    method = METHODS[job.method]
    steps = max(1, (options.passes or TASKS[job.task].passes) // method.passes)
    kwargs: dict[str, Any] = {
        "args": make_args(job, task, target, options, steps),
        "train_dataset": train,
        "eval_dataset": test,
        "data_collator": task.collator,
        "compute_metrics": accuracy,
        "freeze_cache": make_config(task, options),
    }
    if method.settings is None:
        trainer: FreezeCacheTrainer = PlainStochasticGradients(model, **kwargs)
    else:
        trainer = ZeroOrderTrainer(model, **kwargs, zero_order=ZeroOrderConfig(eps=job.eps, **method.settings))
    start = time.perf_counter()
    silence(trainer).train()
    seconds = time.perf_counter() - start
    status = trainer.freeze_status()
    assert status.replaying, "the steps did not run on features"
    evaluated = trainer.evaluate()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    result = {
        "steps": steps,
        "forward_passes": steps * method.passes,
        "seconds": seconds,
        "parameters": status.trainable_parameters,
        "losses": [[entry["step"] * method.passes, entry["loss"]] for entry in log],
        "accuracy": evaluated["eval_accuracy"],
        "test_loss": evaluated["eval_loss"],
    }
    if method.settings is not None:
        result["numbers_drawn"] = log[-1]["zero_order/numbers_drawn"]
    return result


def make_config(task: Task, options: argparse.Namespace, **settings: Any) -> FreezeCacheConfig:
    """Frozen and cached up to the task's cut, from the first epoch on."""
    return FreezeCacheConfig(
        policy="manual",
        freeze_points=f"0:{task.deep}",
        cache="always",
        codec=CODEC,
        feature_cache_dir=str(Path(options.output_dir) / "stores" / task.name),
        report="none",
        **settings,
    )


def make_args(job: Job, task: Task, target: Path, options: argparse.Namespace, steps: int) -> TrainingArguments:
    """Constant settings of all trainings, and the job's."""
    quiet = {**QUIET, "logging_strategy": "steps", "logging_steps": max(1, steps // POINTS)}
    if options.gpu:
        quiet |= {"use_cpu": False, "dataloader_pin_memory": True, "tf32": True}
    return TrainingArguments(
        output_dir=str(target),
        max_steps=steps,
        per_device_train_batch_size=task.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=job.rate,
        lr_scheduler_type="linear",
        max_grad_norm=0.0,
        seed=job.seed,
        **quiet,
    )
