"""What it costs that a policy looks at the training: DeiT-Tiny on Caltech-101 and ResNet-20 on CIFAR-10.

python -m benchmarks.observing.run --threads 1
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from typing import Any

import torch
from torchvision.transforms import v2
from transformers import TrainerCallback, TrainingArguments, set_seed

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer
from hf_freezecache.smartfrz import FreezePredictor, SmartFrzPolicy

from .._common import QUIET, Claim, make_parser, pick, prepare, silence, summary, write_result
from .._images import FINISH, Pixels, as_batch, as_interpolated_batch, load_caltech, load_cifar10, load_deit
from .._resnet import CifarResNet, block_names

RULES = ("autofreeze", "egeria", "simfreeze", "smartfrz")


class EpochSeconds(TrainerCallback):
    """CPU seconds between the beginnings and the ends of epochs."""

    def __init__(self):
        self.seconds, self._since = 0.0, 0.0

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._since = time.process_time()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.seconds += time.process_time() - self._since


def measure(options: argparse.Namespace, images: Any, model: Any, blocks: Any, rule: str) -> dict[str, Any]:
    """A training in which nothing freezes, with a clock around what a rule makes it do.

    Args:
        options: of the run.
        images: that are trained on, in memory: loading would make the steps longer.
        model: copied.
        blocks: names; None: found.
        rule: name of the policy.
    """
    set_seed(options.seed)
    args = TrainingArguments(
        output_dir=options.folder,
        per_device_train_batch_size=options.batch_size,
        num_train_epochs=options.epochs,
        learning_rate=2e-4,
        **{**QUIET, "seed": options.seed},
    )
    trainer = FreezeCacheTrainer(
        model=copy.deepcopy(model),
        args=args,
        train_dataset=images,
        data_collator=as_interpolated_batch if blocks is None else as_batch,
        # Blocks that freeze would not be looked at any more.
        freeze_cache=FreezeCacheConfig(max_frozen=0.0, cache="never", blocks=blocks),
        # A predictor takes the same time whatever it has learned.
        policy=SmartFrzPolicy(FreezePredictor(), max_frozen=0.0) if rule == "smartfrz" else rule,
    )
    trainer.add_callback(clock := EpochSeconds())
    callback, seconds = trainer._freeze_callback, []
    observe = callback.on_pre_optimizer_step

    def timed(*args: Any, **kwargs: Any) -> None:
        begin = time.process_time()
        observe(*args, **kwargs)
        seconds.append(time.process_time() - begin)

    callback.on_pre_optimizer_step = timed  # type: ignore[method-assign]
    silence(trainer).train()
    total, steps = sum(seconds), len(seconds)
    return {
        "steps": steps,
        "step_seconds": (clock.seconds - total) / steps,
        "observing_seconds": summary(seconds),
        "share": total / (clock.seconds - total),
    }


def cifar_pixels(options: argparse.Namespace) -> Pixels:
    """The first rows of CIFAR-10 as pixels."""
    dataset = load_cifar10(options, "train", options.rows)
    transform = v2.Compose([v2.PILToTensor(), *FINISH])
    return Pixels(torch.stack([transform(image) for image in dataset["image"]]), torch.tensor(dataset["label"]))


def parse_options() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--rows", type=int, default=2176, help="training images")
    options = parser.parse_args()
    if options.smoke:
        options.epochs, options.rows, options.image_size = 1, 64, 32
    return options


def main() -> None:
    options = parse_options()
    prepare(options)
    models = {
        "DeiT-Tiny": (load_caltech(options, "train", options.image_size, options.rows), load_deit(options), None),
        "ResNet-20": (cifar_pixels(options), CifarResNet(20), block_names(20)),
    }
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as options.folder:
        for name, (images, model, blocks) in models.items():
            results[name] = {rule: measure(options, images, model, blocks, rule) for rule in RULES}
    claims = [
        Claim(f"{name}, {rule}: CPU seconds of observing relative to those of the steps", found["share"], at_most=0.02)
        for name, by_rule in results.items()
        for rule, found in by_rule.items()
    ]
    write_result("observing", options, pick(options, "epochs batch_size image_size rows"), results, claims)


if __name__ == "__main__":
    main()
