"""Trains a tiny model in one of several processes, with settings from a JSON file, and writes what it saw to another.

Beside `--output` there is one argument, `--settings`, the JSON of a dictionary:

    model: vit, bert (both without dropout; texts are padded to the longest of a batch), resnet, "vit of sizes" (images
        of many) or "shares positions"
    rows: of the training
    config: of `FreezeCacheConfig`; "points" are its `freeze_points`; null: no settings of the user's
    arguments: of `TrainingArguments`
    stop_after: the training is stopped after so many steps
    resume: whether the training resumes from the last checkpoint
    again: whether the same trainer trains a second time
    fault: {"kind": a name of `support.deaths`, "rank": of the process that has it, ...}
    trouble: {"kind": a name of `support.troubles`, "rank": of the process that has it, "step": when}
    trainer: "plain" for a `Trainer`
"""

import argparse
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)

from support.deaths import FAULTS, Images  # noqa: E402
from support.helpers import losses, make_args, manual, pixel_dataset, tiny_resnet, tiny_vit  # noqa: E402
from support.pretrained import settle  # noqa: E402
from support.sharded import SharesPositions, shard_on_cpus  # noqa: E402
from support.sized_images import SizedImages, interpolating  # noqa: E402
from support.token_rows import Pad, Texts, bert  # noqa: E402
from support.troubles import TROUBLES  # noqa: E402

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer  # noqa: E402
from hf_freezecache.distributed import count_operations  # noqa: E402


class StopsAfter(TrainerCallback):
    """Saves a checkpoint and ends the training after a step, as one that was interrupted there."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = state.global_step >= self.step


class CountsOperations(TrainerCallback):
    """Notes how many operations between processes every step begins."""

    def __init__(self):
        self.counts = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.before = count_operations()

    def on_step_end(self, args, state, control, **kwargs):
        self.counts.append(count_operations() - self.before)


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor that may be sharded, as it is in one process."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--settings", type=json.loads, required=True)
    options = parser.parse_args()
    train(options.output, options.settings)
    sys.stdout.flush()
    sys.stderr.flush()
    if options.settings.get("fault") is None:
        os._exit(0)  # threads of libraries still abort the interpreter's own end now and then


def train(output: Path, settings: dict) -> tuple[dict, dict[str, torch.Tensor]]:
    """Trains in this process; returns what it saw and the weights, as it writes them to files."""
    rank = int(os.environ.get("RANK", "0"))
    if "ddp_timeout" in settings.get("arguments", {}):  # on CPUs, `Trainer` does not pass it on
        PartialState(cpu=True, timeout=timedelta(seconds=settings["arguments"]["ddp_timeout"]))
    if "fsdp" in settings.get("arguments", {}):
        shard_on_cpus()
    operations = CountsOperations()
    model, dataset, evaluated, collator = subject(settings)
    fault, callbacks = settings.get("fault"), []
    if fault is not None:
        dataset = Images(dataset)
        if rank == fault["rank"]:
            callbacks = FAULTS[fault["kind"]](dataset, fault)
    trouble = settings.get("trouble")
    if trouble is not None and rank == trouble["rank"]:
        callbacks = [*callbacks, TROUBLES[trouble["kind"]](trouble["step"])]
    if "stop_after" in settings:
        callbacks = [*callbacks, StopsAfter(settings["stop_after"])]
    config = settings.get("config", {"points": "1:3"})
    own = {}
    if settings.get("trainer") != "plain":
        cache = str(output / "cache")
        own["freeze_cache"] = None if config is None else settings_of({"feature_cache_dir": cache, **config})
    trainer = (Trainer if settings.get("trainer") == "plain" else FreezeCacheTrainer)(
        model=settle(model) if config is None or "head_start_epochs" in config else model,
        args=make_args(output / "run", **{"ddp_timeout": 60, **settings.get("arguments", {})}),
        train_dataset=dataset,
        eval_dataset=evaluated,
        data_collator=collator,
        callbacks=[*callbacks, operations],
        **own,
    )
    trainer.train(resume_from_checkpoint=settings.get("resume", False))
    if settings.get("again"):
        trainer.train()
    seen = {**look_at(trainer), "operations": operations.counts}
    tensors = {name: whole(value).clone() for name, value in trainer.model.state_dict().items()}
    save_file(tensors, output / f"weights-{rank}.safetensors")
    (output / f"rank-{rank}.json").write_text(json.dumps(seen), encoding="utf-8")
    trainer.accelerator.end_training()
    return seen, tensors


def subject(settings: dict) -> tuple:
    """Model, samples of the training and of evaluations, and their collator."""
    rows = settings.get("rows", 48)
    if settings.get("model") == "bert":
        model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        return model, Texts(rows), Texts(32), Pad()
    if settings.get("model") == "vit of sizes":
        images = SizedImages(rows, tuple((16, 16 + 4 * number) for number in range(rows // 2)), in_a_row=2)
        return tiny_vit(hidden_dropout_prob=0.0), images, images, interpolating
    if settings.get("model") == "shares positions":
        return SharesPositions(), pixel_dataset(rows, 16), pixel_dataset(32, 16, seed=5), None
    model, size = (tiny_resnet(), 32) if settings.get("model") == "resnet" else (tiny_vit(hidden_dropout_prob=0.0), 16)
    return model, pixel_dataset(rows, size), pixel_dataset(32, size, seed=5), None


def settings_of(config: dict) -> FreezeCacheConfig:
    """Those of `support.helpers.manual`, unless they name another policy."""
    return FreezeCacheConfig(**config) if "policy" in config else manual(**config)


def look_at(trainer: Trainer) -> dict:
    """What a trainer has done, as JSON values."""
    seen = {
        "losses": losses(trainer),
        "steps": trainer.state.global_step,
        "processes": trainer.args.world_size,
        "optimizer_states": len(trainer.optimizer.state),
        "evaluations": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
    }
    if isinstance(trainer, FreezeCacheTrainer):
        status, phases = trainer.freeze_status(), trainer.freeze_cache_report().phases
        seen |= {"cut": status.cut, "replaying": status.replaying, "modes": [phase.mode for phase in phases]}
        seen["built"] = sum(phase.mode == "build" and phase.epochs for phase in phases)
    return seen


if __name__ == "__main__":
    main()
