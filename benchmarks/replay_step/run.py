"""A replay step through `FreezeCacheTrainer` against the same suffix step on features that are in memory as floats.

python -m benchmarks.replay_step.run
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms import v2
from transformers import TrainerCallback, TrainingArguments

from hf_freezecache import BlockChain, FeatureStore, FreezeCacheConfig, FreezeCacheTrainer, ReplayableTransform

from .._common import QUIET, Claim, in_turn, make_parser, pick, prepare, silence, summary, write_result
from .._images import Pixels, add_image_options, as_batch, load_caltech, load_deit
from .._trainings import MemoryTrainer

#: By augmented views in the store.
LIMITS = {0: 1.05, 1: 1.10}


@dataclass(frozen=True)
class Augmented(Dataset):
    """The images through a replayable transform.

    Args:
        images: preprocessed.
        transform: of their tensors.
    """

    images: Pixels
    transform: ReplayableTransform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        batch = self.images.__getitems__(indices)
        views = self.transform({"image": list(batch["pixel_values"])})["pixel_values"]
        return {"pixel_values": torch.stack(views), "labels": batch["labels"]}


def augment(images: Pixels, size: int) -> Augmented:
    """Random resized crops and flips of the images; the base view is the image as it is."""
    train = v2.Compose([v2.RandomResizedCrop(size, scale=(0.35, 1.0), antialias=True), v2.RandomHorizontalFlip()])
    return Augmented(images, ReplayableTransform(train=train, base=v2.Identity()))


class StepClock(TrainerCallback):
    """Seconds from one step's beginning to the next one's: loading, transfer, forward, backward and optimizer."""

    def __init__(self):
        self._begins: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._begins.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """All steps but the first, in which the optimizer's state is made, and the last, which has no next one."""
        return [after - before for before, after in zip(self._begins[1:], self._begins[2:], strict=False)]


def make_args(folder: str, options: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        **QUIET,
        seed=options.seed,
    )


def replay_block(
    model: nn.Module, images: Dataset, cut: int, views: int, folder: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Trains some steps from the store, which the first block builds."""
    clock = StepClock()
    trainer = FreezeCacheTrainer(
        model=model,
        args=make_args(folder, options),
        train_dataset=images,
        data_collator=as_batch,
        callbacks=[clock],
        freeze_cache=FreezeCacheConfig(
            policy="manual", freeze_points=f"0:{cut}", cache="always", codec=options.codec, views=views
        ),
    )
    silence(trainer).train()
    status = trainer.freeze_status()
    phase = next(phase for phase in trainer.freeze_cache_report().phases if phase.mode == "replay")
    return {
        "seconds": clock.seconds,
        "store": FeatureStore.open(status.store_path),
        "flops_per_step": phase.flops / phase.steps,
        "weights": trainer.model.state_dict(),
    }


def memory_block(model: nn.Module, features: Pixels, probe: Any, cut: int, folder: str, options) -> dict:
    """Trains the same steps on features in memory."""
    chain = BlockChain.from_model(model, probe=probe)
    chain.freeze(cut)
    clock = StepClock()
    trainer = MemoryTrainer(
        model=model,
        args=make_args(folder, options),
        train_dataset=features,
        data_collator=as_batch,
        callbacks=[clock],
        chain=chain,
        cut=cut,
    )
    silence(trainer).train()
    return {"seconds": clock.seconds, "weights": trainer.model.state_dict()}


def measure_cut(cut: int, views: int, model: nn.Module, images: Pixels, options: argparse.Namespace) -> dict[str, Any]:
    """Blocks of steps of the two sides in turn; the first round is a check and a warm-up, and not counted."""
    probe = images.__getitems__(range(2))
    replayed = augment(images, options.image_size) if views else images
    seconds: dict[str, list[float]] = {"replay": [], "memory": []}
    with tempfile.TemporaryDirectory() as folder:
        first = replay_block(copy.deepcopy(model), replayed, cut, views, folder, options)
        store = first["store"]
        features = Pixels(store.read(range(len(store))), images.labels)
        second = memory_block(copy.deepcopy(model), features, probe, cut, folder, options)
        same = all(torch.equal(first["weights"][name], value) for name, value in second["weights"].items())
        for number in range(options.rounds):
            for side in in_turn(seconds, number):
                fresh = copy.deepcopy(model)
                if side == "replay":
                    block = replay_block(fresh, replayed, cut, views, folder, options)
                else:
                    block = memory_block(fresh, features, probe, cut, folder, options)
                seconds[side] += block["seconds"]
        read = time_decoding(store, options)
    result = {side: summary(values) for side, values in seconds.items()}
    return {
        "cut": cut,
        "views": store.manifest.views,
        "sensitive_channels": len(store.manifest.sensitive_channels or ()),
        "replay_step_seconds": result["replay"],
        "memory_step_seconds": result["memory"],
        "ratio": result["replay"]["median"] / result["memory"]["median"],
        "read_and_decode_seconds": read,
        "suffix_flops_per_step": first["flops_per_step"],
        "store_bytes": store.bytes,
        # Augmented views are other features than those in memory.
        "same_weights_after_a_block": None if views else same,
    }


def time_decoding(store: FeatureStore, options: argparse.Namespace, repeats: int = 20) -> float:
    """Median seconds to read and decode a random batch, beside any training."""
    generator = torch.Generator().manual_seed(options.seed)
    seconds = []
    for _ in range(repeats):
        rows = torch.randperm(len(store), generator=generator)[: options.batch_size].tolist()
        start = time.perf_counter()
        store.read(rows)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--cuts", type=int, nargs="+", default=[4, 8, 10])
    parser.add_argument("--views", type=int, nargs="+", default=sorted(LIMITS), choices=sorted(LIMITS))
    parser.add_argument("--codec", default="int4")
    add_image_options(parser, rows=320)
    parser.add_argument(
        "--steps", type=int, default=12, help="steps of a block; all but the first and the last are timed"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed blocks of each side")
    options = parser.parse_args(argv)
    if options.smoke:
        options.cuts, options.batch_size, options.rows, options.steps, options.rounds = [10], 8, 32, 4, 2
    return options


def main() -> None:
    options = parse_options()
    prepare(options)
    images = load_caltech(options, "train", options.image_size, options.rows)
    model = load_deit(options)
    results, claims = [], []
    for cut, views in [(cut, views) for cut in options.cuts for views in options.views]:
        result = measure_cut(cut, views, model, images, options)
        results.append(result)
        replay, memory = result["replay_step_seconds"]["median"], result["memory_step_seconds"]["median"]
        print(
            f"cut {cut}, {views} views: replay {1e3 * replay:.1f} ms, in memory {1e3 * memory:.1f} ms, "
            f"ratio {result['ratio']:.3f}, {result['suffix_flops_per_step'] / 1e9:.1f} GFLOPs a step, same weights: "
            f"{result['same_weights_after_a_block']}",
            flush=True,
        )
        what = f"replay step / step on features in memory, cut {cut}, {views} augmented views"
        claims.append(Claim(what, result["ratio"], at_most=LIMITS[views]))
    settings = pick(options, "codec image_size batch_size rows steps rounds")
    write_result("replay_step", options, settings, results, claims)


if __name__ == "__main__":
    main()
