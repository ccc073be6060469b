"""Trains a tiny model in one of several processes, with settings from a JSON file, and writes what it saw to another.

Beside `--output` there is one argument, `--settings`, the JSON of a dictionary:

    model: vit (without dropout) or resnet
    rows: of the training
    config: of `FreezeCacheConfig`; "points" are its `freeze_points`; null: no settings of the user's
    arguments: of `TrainingArguments`
    resume: whether the training resumes from the last checkpoint
    fault: {"kind": a name of `support.deaths`, "rank": of the process that has it, ...}
    trainer: "plain" for a `Trainer`
"""

import argparse
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from safetensors.torch import save_file
from accelerate import PartialState
from transformers import Trainer

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)
import faulthandler
faulthandler.dump_traceback_later(float(os.environ.get("DUMP_AFTER", 1000)))

from support.deaths import FAULTS, Images  # noqa: E402
from support.helpers import losses, make_args, manual, pixel_dataset, tiny_resnet, tiny_vit  # noqa: E402
from support.pretrained import settle  # noqa: E402

from hf_freezecache import FreezeCacheTrainer  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--settings", type=json.loads, required=True)
    options = parser.parse_args()
    output, settings, rank = options.output, options.settings, int(os.environ.get("RANK", "0"))
    if "ddp_timeout" in settings.get("arguments", {}):  # on CPUs, `Trainer` does not pass it on
        PartialState(cpu=True, timeout=timedelta(seconds=settings["arguments"]["ddp_timeout"]))
    model, size = (tiny_resnet(), 32) if settings.get("model") == "resnet" else (tiny_vit(hidden_dropout_prob=0.0), 16)
    dataset = pixel_dataset(settings.get("rows", 48), size)
    fault, callbacks = settings.get("fault"), []
    if fault is not None:
        dataset = Images(dataset)
        if rank == fault["rank"]:
            callbacks = FAULTS[fault["kind"]](dataset, fault)
    config = settings.get("config", {"points": "1:3"})
    own = {}
    if settings.get("trainer") != "plain":
        cache = str(output / "cache")
        own["freeze_cache"] = None if config is None else manual(**{"feature_cache_dir": cache, **config})
    trainer = (Trainer if settings.get("trainer") == "plain" else FreezeCacheTrainer)(
        model=settle(model) if config is None else model,
        args=make_args(output / "run", **{"ddp_timeout": 60, **settings.get("arguments", {})}),
        train_dataset=dataset,
        eval_dataset=pixel_dataset(22, size, seed=5),
        callbacks=callbacks,
        **own,
    )
    trainer.train(resume_from_checkpoint=settings.get("resume", False))
    seen = {"losses": losses(trainer), "steps": trainer.state.global_step, "processes": trainer.args.world_size}
    seen["evaluations"] = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if not own == {}:
        status = trainer.freeze_status()
        seen |= {"cut": status.cut, "replaying": status.replaying}
        seen["modes"] = [phase.mode for phase in trainer.freeze_cache_report().phases]
        seen["built"] = [phase.epochs for phase in trainer.freeze_cache_report().phases if phase.mode == "build"]
    tensors = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
    save_file(tensors, output / f"weights-{rank}.safetensors")
    (output / f"rank-{rank}.json").write_text(json.dumps(seen), encoding="utf-8")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
