"""Trains a tiny model without gradients in one of several processes and writes what the process saw to a JSON file."""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from transformers import Trainer

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)

from support.helpers import losses, make_args, manual, pixel_dataset, tiny_vit  # noqa: E402

from hf_freezecache import ZeroOrderConfig, ZeroOrderTrainer  # noqa: E402
from hf_freezecache.cache.fingerprint import tensors_digest  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cache", default="always")
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    model = tiny_vit()
    if int(os.environ.get("RANK", "0")):
        torch.nn.init.normal_(model.classifier.weight)  # the main process's weights are everybody's
    trainer = ZeroOrderTrainer(
        model=model,
        args=make_args(options.output / "run", per_device_train_batch_size=options.batch, learning_rate=1e-2),
        train_dataset=pixel_dataset(rows=48),
        freeze_cache=manual("1:2", codec="fp32", cache=options.cache, feature_cache_dir=str(options.output / "cache")),
        zero_order=ZeroOrderConfig(number_reuse="pool", pool_size=1023),
    )
    exchanged, reduce = [], torch.distributed.all_reduce
    step = type(trainer).training_step

    def noting_reduce(tensor, *args, **kwargs):
        exchanged.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    def noting_step(self, *args, **kwargs):
        torch.distributed.all_reduce = noting_reduce
        try:
            return step(self, *args, **kwargs)
        finally:
            torch.distributed.all_reduce = reduce

    type(trainer).training_step = noting_step
    trainer.train()
    seen = {
        "losses": losses(trainer),
        "replaying": trainer.freeze_status().replaying,
        "weights": tensors_digest(dict(trainer.model.named_parameters())),
        "head": trainer.model.classifier.weight.tolist(),
        "exchanged": exchanged,
        "is_wrapped": trainer.model_wrapped is not trainer.model,
        "gradients": sum(parameter.grad is not None for parameter in trainer.model.parameters()),
    }
    # The same model, along gradients: processes must agree on them.
    args = make_args(options.output / "later", per_device_train_batch_size=options.batch, max_steps=3)
    later = Trainer(model=model, args=args, train_dataset=pixel_dataset(rows=48))
    later.train()
    seen["later"] = tensors_digest(dict(model.named_parameters()))
    seen["is_wrapped_later"] = later.model_wrapped is not later.model
    path = options.output / f"rank-{trainer.accelerator.process_index}.json"
    path.write_text(json.dumps(seen), encoding="utf-8")
    trainer.accelerator.end_training()
    sys.stdout.flush()
    os._exit(0)  # threads of libraries still abort the interpreter's own end now and then


if __name__ == "__main__":
    main()
