"""Models of real size with random weights, their data, and blocks of training steps that are timed with the GPU."""

from __future__ import annotations

import argparse
import copy
import gc
import io
import itertools
import math
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import torchvision
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms import v2
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_freezecache import BlockChain, FeatureStore, FreezeCacheConfig, FreezeCacheTrainer

from .._common import QUIET, silence
from .._images import CLASSES, FINISH, as_batch
from .._trainings import MemoryTrainer

#: Images of which a data set repeats the pixels: the memory of 16,384 images is not needed to time a step.
DISTINCT = 256


# The machine


def use_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    return torch.device("cuda" if use_gpu() else "cpu")


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if use_gpu():
        torch.cuda.synchronize()


def describe_card() -> dict[str, Any]:
    """The GPU, its driver and the libraries that use it; the card is None on a CPU."""
    about = {
        "card": None,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if not use_gpu():
        return about
    properties = torch.cuda.get_device_properties(0)
    query = "driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw,power.limit"
    answer = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return {
        **about,
        "card": properties.name,
        "card_memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cudnn": torch.backends.cudnn.version(),
        query: answer.stdout.strip() or answer.stderr.strip(),
    }


# Models


def make_model(name: str, smoke: bool) -> nn.Module:
    """A model with random weights.

    Args:
        name: `vit-base` (ViT-B/16), `deit-tiny` (DeiT-Tiny, as a ViT) or `resnet-50`.
        smoke: a tiny one of the same family.
    """
    if name == "resnet-50":
        tiny = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2]} if smoke else {}
        return ResNetForImageClassification(ResNetConfig(num_labels=CLASSES, **tiny))
    sizes = {"vit-base": (768, 12, 12), "deit-tiny": (192, 12, 3)}
    width, layers, heads = (32, 4, 2) if smoke else sizes[name]
    config = ViTConfig(
        image_size=image_size(smoke),
        patch_size=16,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        num_labels=CLASSES,
    )
    return ViTForImageClassification(config)


def image_size(smoke: bool) -> int:
    return 32 if smoke else 224


def cut_at(fraction: float, blocks: int) -> int:
    """The cut that freezes the stem and a fraction of the other blocks."""
    return 1 + round(fraction * (blocks - 1))


# Data


class Pool(Dataset):
    """Rows in memory; a batch is one indexing. Row i has the values of row `i % len(values)`.

    Args:
        values: `(N, ...)`, images or features, on any device.
        labels: int64 `(rows,)`, on the same device.
    """

    def __init__(self, values: torch.Tensor, labels: torch.Tensor):
        self.values, self.labels = values, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        rows = torch.tensor(indices, device=self.values.device)
        return {"pixel_values": self.values[rows % len(self.values)], "labels": self.labels[rows]}


class RandomImages(Pool):
    """Decoded, normalized float32 images. They follow from the seed, so the pickled data set is small.

    Args:
        rows: number of rows.
        size: pixels of a side.
        seed: of pixels and labels.
    """

    def __init__(self, rows: int, size: int, seed: int):
        self._made_of = (rows, size, seed)
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randn(min(rows, DISTINCT), 3, size, size, generator=generator)
        super().__init__(pixels, torch.randint(CLASSES, (rows,), generator=generator))

    def __getstate__(self) -> dict[str, Any]:
        return {"made_of": self._made_of}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["made_of"])  # type: ignore[misc]  # as pickled


class JpegImages(Dataset):
    """JPEG files in memory, decoded, resized to 8/7 of the size, cropped and normalized whenever a row is read.

    Args:
        rows: number of rows.
        size: pixels of a side after the crop.
        seed: of pixels and labels.
    """

    def __init__(self, rows: int, size: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        # Smooth colours with a little noise: files of about the size of photographs.
        coarse = torch.rand(min(rows, DISTINCT), 3, 12, 16, generator=generator)
        smooth = nn.functional.interpolate(coarse, (size * 5 // 3, size * 20 // 9), mode="bicubic").clamp(0, 1)
        noisy = (smooth + 0.04 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)
        self.files = [_as_jpeg(image) for image in (255 * noisy).to(torch.uint8)]
        self.labels = torch.randint(CLASSES, (rows,), generator=generator).tolist()
        self.transform = v2.Compose(
            [v2.PILToTensor(), v2.Resize(size * 8 // 7, antialias=True), v2.CenterCrop(size), *FINISH]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = PIL.Image.open(io.BytesIO(self.files[index % len(self.files)])).convert("RGB")
        return {"pixel_values": self.transform(image), "labels": self.labels[index]}


def _as_jpeg(image: torch.Tensor) -> bytes:
    content = io.BytesIO()
    PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).save(content, "JPEG", quality=90)
    return content.getvalue()


# Blocks of training steps


class BlockClock(TrainerCallback):
    """Seconds of a step, from one step's beginning to a later one's, with the GPU idle at both ends.

    In between nothing waits for the GPU besides what `Trainer` does itself. Loading is in it.

    Args:
        warmup: steps before that are not counted; the last step is not counted either.

    Attributes:
        step_seconds: mean of the counted steps.
        single_steps: seconds of each of them, as the host sees it: `Trainer` waits for the GPU once a step.
        data_wait_share: share of the counted steps between the end of one and the beginning of the next: loading a
            batch, and moving it to the GPU.
        peak_bytes: peak of the GPU's memory during them, in all; 0 on a CPU.
    """

    def __init__(self, warmup: int):
        self.warmup = warmup
        self.step_seconds, self.peak_bytes = float("nan"), 0
        self._begun: list[float] = []
        self._waited = 0.0
        self._ended: float | None = None

    def on_step_end(self, args, state, control, **kwargs):
        self._ended = time.perf_counter() if self.warmup < state.global_step < state.max_steps else None

    def on_step_begin(self, args, state, control, **kwargs):
        if self._ended is not None:
            self._waited += time.perf_counter() - self._ended
        if state.global_step == self.warmup:
            synchronize()
            if use_gpu():
                torch.cuda.reset_peak_memory_stats()
        elif state.global_step == state.max_steps - 1:
            synchronize()
            self.step_seconds = (time.perf_counter() - self._begun[0]) / (state.global_step - self.warmup)
            if use_gpu():
                self.peak_bytes = torch.cuda.max_memory_allocated()
        if self.warmup <= state.global_step < state.max_steps:
            self._begun.append(time.perf_counter())

    @property
    def data_wait_share(self) -> float:
        return self._waited / (self._begun[-1] - self._begun[0])

    @property
    def single_steps(self) -> list[float]:
        return [end - begin for begin, end in itertools.pairwise(self._begun)]


@dataclass(frozen=True)
class Setting:
    """What the sides of a comparison have in common.

    Args:
        model: its name.
        batch_size: rows of a step.
        fraction: of the blocks behind the stem that is frozen.
        codec: of the store.
        compiled: whether live steps are compiled (`torch_compile=True`); replayed ones never are.
    """

    model: str
    batch_size: int
    fraction: float
    codec: str = "int4"
    compiled: bool = False


class Bench:
    """The sides of one setting: each makes a trainer on a fresh copy of the same model.

    Args:
        setting: model, batch, cut and codec.
        options: steps, rows, workers and seed.
        folder: of stores and outputs, on the local disk.
        rows: of the data set; if None, those of the options, and at least one for every sample of a block.
    """

    def __init__(self, setting: Setting, options: argparse.Namespace, folder: Path, rows: int | None = None):
        self.setting, self.options, self.folder = setting, options, folder
        set_seed(options.seed)
        self.model = make_model(setting.model, options.smoke).to(device())
        self.rows = rows or max(options.rows, options.steps * setting.batch_size)
        self.images = RandomImages(self.rows, image_size(options.smoke), options.seed)
        self.probe = {name: value.to(device()) for name, value in self.images.__getitems__([0, 1]).items()}
        self.blocks = len(BlockChain.from_model(copy.deepcopy(self.model), probe=self.probe))
        self.cut = cut_at(setting.fraction, self.blocks)
        self._features: dict[str, Pool] = {}
        self._jpegs: JpegImages | None = None
        self._images_on_device: Pool | None = None
        self.store: FeatureStore | None = None

    def arguments(self, **settings) -> TrainingArguments:
        """`TrainingArguments` as a user with a GPU has them: bf16, pinned memory, fused AdamW."""
        common = {
            "output_dir": str(self.folder),
            "max_steps": self.options.steps,
            "per_device_train_batch_size": self.setting.batch_size,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "seed": self.options.seed,
            **QUIET,
            "bf16": True,
            "use_cpu": not use_gpu(),
            "dataloader_pin_memory": use_gpu(),
            "torch_compile": self.setting.compiled,
        }
        return TrainingArguments(**{**common, **settings})

    def plain(self, callbacks: list[TrainerCallback], **settings) -> Trainer:
        return self._trainer(Trainer, self.images, callbacks, settings)

    def frozen(self, callbacks: list[TrainerCallback], **settings) -> Trainer:
        """Freezing without a cache: the prefix runs on images in every step."""
        return self._trainer(FreezeCacheTrainer, self.images, callbacks, settings, freeze_cache=self.config("never"))

    def replayed(self, callbacks: list[TrainerCallback], offload: bool = True, **settings) -> Trainer:
        """From the store, which the first call builds."""
        config = replace(self.config("always"), offload_frozen=offload)
        return self._trainer(FreezeCacheTrainer, self.images, callbacks, settings, freeze_cache=config)

    def memory(self, callbacks: list[TrainerCallback], where: str) -> Trainer:
        """A plain `Trainer` on the store's decoded features in memory, the prefix bypassed.

        Args:
            callbacks: of the trainer.
            where: `cuda` or `cpu`.
        """
        chain = BlockChain.from_model(copy.deepcopy(self.model), probe=self.probe)
        chain.freeze(self.cut)
        settings = {"dataloader_pin_memory": use_gpu() and where == "cpu"}
        dataset = self._features_in(where)
        return self._trainer(MemoryTrainer, dataset, callbacks, settings, model=chain.model, chain=chain, cut=self.cut)

    def config(self, cache: str, codec: str | None = None) -> FreezeCacheConfig:
        return FreezeCacheConfig(
            policy="manual",
            freeze_points=f"0:{self.cut}",
            cache=cache,  # type: ignore[arg-type]  # checked by the class
            codec=codec or self.setting.codec,
            feature_cache_dir=str(self.folder / "stores"),
        )

    def images_on_device(self) -> Pool:
        """The same images as `plain` trains on, in the GPU's memory."""
        if self._images_on_device is None:
            images = self.images
            self._images_on_device = Pool(images.values.to(device()), images.labels.to(device()))
        return self._images_on_device

    def jpegs(self) -> JpegImages:
        if self._jpegs is None:
            self._jpegs = JpegImages(self.rows, image_size(self.options.smoke), self.options.seed)
        return self._jpegs

    def sides(self) -> dict[str, Callable[[list[TrainerCallback]], Trainer]]:
        """Makers of trainers by the name of their side; each takes the callbacks."""
        workers = self.options.workers
        few = min(4, workers)
        from_jpegs = dict(dataset=self.jpegs, data_collator=None, dataloader_num_workers=workers)
        return {
            "plain": self.plain,
            "plain_gpu": lambda callbacks: self.plain(
                callbacks, dataset=self.images_on_device, dataloader_pin_memory=False
            ),
            "freeze_only": self.frozen,
            "plain_jpeg": lambda callbacks: self.plain(callbacks, **from_jpegs),
            "freeze_only_jpeg": lambda callbacks: self.frozen(callbacks, **from_jpegs),
            "replay": self.replayed,
            "replay_resident": lambda callbacks: self.replayed(callbacks, offload=False),
            "replay_workers": lambda callbacks: self.replayed(callbacks, dataloader_num_workers=few),
            "memory_gpu": lambda callbacks: self.memory(callbacks, device().type),
            "memory_host": lambda callbacks: self.memory(callbacks, "cpu"),
        }

    def run_block(self, side: str) -> dict[str, Any]:
        """Trains a block of steps.

        Args:
            side: its name.

        Returns:
            Seconds of a step, the peak of the GPU's memory without what the benchmark itself keeps there, and the
            seconds of the whole block, with all that happens before its first step.
        """
        if side.startswith("memory"):
            self._features_in(device().type if side == "memory_gpu" else "cpu")
        elif side == "plain_gpu":
            self.images_on_device()
        gc.collect()
        kept = torch.cuda.memory_allocated() if use_gpu() else 0
        clock, start = BlockClock(self.options.warmup), time.perf_counter()
        trainer = self.sides()[side]([clock])
        trainer.train()
        if not math.isfinite(clock.step_seconds):
            raise RuntimeError(f"{side}: the training ended before step {self.options.steps}.")
        block = {
            "step_seconds": clock.step_seconds,
            "single_steps": clock.single_steps,
            "data_wait_share": clock.data_wait_share,
            "peak_bytes": max(0, clock.peak_bytes - kept),
        }
        if side.startswith("replay"):
            block |= self._note_store(trainer)
        del trainer
        return {**block, "block_seconds": time.perf_counter() - start}

    def _note_store(self, trainer: Trainer) -> dict[str, Any]:
        status = trainer.freeze_status()
        if not status.replaying and self.store is None:
            raise RuntimeError(f"nothing was replayed: {trainer.freeze_cache_report()}")
        if self.store is None:
            self.store = FeatureStore.open(status.store_path)
        built = [phase for phase in trainer.freeze_cache_report().phases if phase.mode == "build"]
        return {"build_seconds": sum(phase.seconds for phase in built)}

    def _features_in(self, where: str) -> Pool:
        if where not in self._features:
            if self.store is None:
                raise RuntimeError("the features come from the store: run a replay block first.")
            count = min(self.rows, 16 * self.setting.batch_size)
            features = self.store.read(range(count), device=where)
            self._features[where] = Pool(features, self.images.labels.to(where))
        return self._features[where]

    def _trainer(self, cls, dataset, callbacks, settings: dict[str, Any], model=None, **more) -> Trainer:
        if "dataset" in settings:
            dataset = settings["dataset"]()
        collator = settings.get("data_collator", as_batch)
        args = {name: value for name, value in settings.items() if name not in ("dataset", "data_collator")}
        trainer = cls(
            model=copy.deepcopy(self.model) if model is None else model,
            args=self.arguments(**args),
            train_dataset=dataset,
            data_collator=collator,
            callbacks=callbacks,
            **more,
        )
        return silence(trainer)
