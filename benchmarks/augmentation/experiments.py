"""The two trainings: data, model, settings and arms."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import torch
from torch import nn
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional
from transformers import default_data_collator

from .._images import FINISH, Pixels, load_caltech, load_caltech_files, load_cifar10, load_deit
from .._resnet import CifarResNet, block_names

FREEZE_ONLY = "freeze only"
NONE = "none"
FLIP = "naive flip"

_CIFAR_SIZE, _CALTECH_SIZE = 32, 112
_CIFAR_NORMALIZE = v2.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


@dataclass(frozen=True)
class Arm:
    """One way to train after the freeze.

    Args:
        name: in tables and files.
        cache: of `FreezeCacheConfig`.
        views: augmented views stored beside the base view.
        sensitive_fraction: of the channels, stored for every view; 1.0 stores whole views.
        flip: whether the views are the horizontal flip of the base view, in place of draws of the train pipeline.
    """

    name: str
    cache: str = "always"
    views: int = 0
    sensitive_fraction: float = 0.0
    flip: bool = False


def gamma(fraction: float, views: int = 1) -> str:
    """Name of an arm that stores a fraction of the channels for every view."""
    return f"gamma {fraction:g} x {views}"


def whole(views: int = 1) -> str:
    """Name of an arm that stores whole views."""
    return f"whole x {views}"


def _gamma_arm(fraction: float, views: int = 1) -> Arm:
    return Arm(gamma(fraction, views), views=views, sensitive_fraction=fraction)


def _whole_arm(views: int = 1) -> Arm:
    return Arm(whole(views), views=views, sensitive_fraction=1.0)


@dataclass(frozen=True)
class Data:
    """What an experiment trains and tests on.

    Args:
        train: columns `image` and `label`, without a transform.
        test: preprocessed images.
    """

    train: datasets.Dataset
    test: Pixels


@dataclass(frozen=True)
class Experiment:
    """A training with its arms.

    Args:
        name: in files.
        title: of the plot.
        arms: the first one freezes only; the others are compared with it.
        load_data: from the options and the row limits.
        load_model: a fresh model, drawn from torch's generator.
        train, base, flip: pipelines; the last one for the arm that flips alone.
        collator: of train and test samples.
        blocks: the chain, or None if the library knows it.
        cut: blocks that are frozen after the live epochs.
        live_epochs: before the freeze, shared by all arms.
        frozen_epochs: after it.
        batch_size: samples of a step.
        learning_rate: the highest; cosine to 0 over all epochs, live and frozen.
        arguments: more of `TrainingArguments`.
        evaluate_every: epochs.
        rows, test_rows: images; None for all.
    """

    name: str
    title: str
    arms: tuple[Arm, ...]
    load_data: Callable[[argparse.Namespace, int | None, int | None], Data]
    load_model: Callable[[argparse.Namespace], nn.Module]
    train: Callable
    base: Callable
    flip: Callable
    collator: Callable
    blocks: list[str] | None
    cut: int
    live_epochs: int
    frozen_epochs: int
    batch_size: int
    learning_rate: float
    arguments: Mapping[str, Any]
    evaluate_every: int
    rows: int | None = None
    test_rows: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What a result depends on, as JSON values."""
        names = ("cut", "live_epochs", "frozen_epochs", "batch_size", "learning_rate", "evaluate_every")
        numbers = {name: getattr(self, name) for name in (*names, "rows", "test_rows")}
        pipelines = {name: " ".join(str(getattr(self, name)).split()) for name in ("train", "base")}
        return {**numbers, "arguments": dict(self.arguments), **pipelines}

    def shortened(self) -> Experiment:
        """The same with tiny settings: nothing it measures means anything."""
        return replace(self, live_epochs=1, frozen_epochs=2, evaluate_every=1, rows=160, test_rows=100)


def make_experiments(options: argparse.Namespace) -> dict[str, Experiment]:
    """All of them, by name."""
    experiments = (_cifar10(), _caltech())
    return {each.name: each.shortened() if options.smoke else each for each in experiments}


# CIFAR-10, from scratch


def _cifar10() -> Experiment:
    finish = [v2.ToDtype(torch.float32, scale=True), _CIFAR_NORMALIZE]
    return Experiment(
        name="cifar10",
        title="ResNet-20 from scratch, 10,000 images of CIFAR-10",
        arms=(
            Arm(FREEZE_ONLY, cache="never"),
            Arm(NONE),
            Arm(FLIP, views=1, flip=True),
            _whole_arm(),
            _whole_arm(views=2),
            _gamma_arm(0.25),
            _gamma_arm(0.1),
            _gamma_arm(0.5),
            _gamma_arm(0.25, views=2),
        ),
        load_data=_load_cifar10,
        load_model=lambda options: CifarResNet(20),
        train=v2.Compose([v2.ToImage(), v2.RandomCrop(_CIFAR_SIZE, padding=4), v2.RandomHorizontalFlip(), *finish]),
        base=v2.Compose([v2.ToImage(), *finish]),
        # Of this view nothing but the geometry is kept; without the jitter there would be nothing random to replay.
        flip=v2.Compose([v2.ToImage(), v2.RandomHorizontalFlip(p=1.0), v2.ColorJitter(0.1), *finish]),
        collator=collate,
        blocks=block_names(20),
        cut=7,
        live_epochs=8,
        frozen_epochs=12,
        batch_size=64,
        learning_rate=0.1,
        arguments={"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 5e-4, "max_grad_norm": 0.0},
        evaluate_every=20,
        rows=10_000,
    )


def _load_cifar10(options: argparse.Namespace, rows: int | None, test_rows: int | None) -> Data:
    train, test = load_cifar10(options, "train", rows), load_cifar10(options, "test", test_rows)
    pixels = torch.stack([functional.pil_to_tensor(image) for image in test["image"]])
    return Data(train, Pixels(_CIFAR_NORMALIZE(pixels.float() / 255), torch.tensor(test["label"])))


# Caltech-101, fine-tuning


def _caltech() -> Experiment:
    size = _CALTECH_SIZE
    bicubic = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}
    return Experiment(
        name="caltech",
        title=f"DeiT-Tiny fine-tuned on Caltech-101 at {size} px",
        arms=(Arm(FREEZE_ONLY, cache="never"), Arm(NONE), _gamma_arm(0.25), _whole_arm()),
        load_data=_load_caltech,
        load_model=load_deit,
        train=v2.Compose(
            [
                v2.ToImage(),
                v2.RandomResizedCrop(size, scale=(0.35, 1.0), **bicubic),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(0.3, 0.3, 0.3),
                *FINISH,
            ]
        ),
        base=v2.Compose([v2.ToImage(), v2.Resize(size * 8 // 7, **bicubic), v2.CenterCrop(size), *FINISH]),
        flip=v2.Compose(
            [
                v2.ToImage(),
                v2.Resize(size * 8 // 7, **bicubic),
                v2.CenterCrop(size),
                v2.RandomHorizontalFlip(p=1.0),
                *FINISH,
            ]
        ),
        collator=collate_interpolated,
        blocks=None,
        cut=8,
        live_epochs=3,
        frozen_epochs=5,
        batch_size=32,
        learning_rate=2e-4,
        arguments={"warmup_steps": 0.1, "weight_decay": 0.05},
        evaluate_every=8,
    )


def _load_caltech(options: argparse.Namespace, rows: int | None, test_rows: int | None) -> Data:
    train = load_caltech_files(options, "train", rows)
    # Decoding photographs of 300 px in every epoch would be most of the time; crops of 112 px lose nothing visible.
    train = train.map(_shrink, batched=True, batch_size=100, keep_in_memory=True)
    return Data(train, load_caltech(options, "test", _CALTECH_SIZE, test_rows))


def _shrink(rows: dict[str, list], side: int = 160) -> dict[str, list]:
    return {"image": [functional.resize(image.convert("RGB"), side) for image in rows["image"]]}


# Both


def collate(rows: Sequence[Mapping[str, Any]] | dict[str, Any]) -> dict[str, Any]:
    """Samples of the train set, or a batch of `Pixels`, which is one already."""
    return rows if isinstance(rows, dict) else default_data_collator(rows)


def collate_interpolated(rows: Sequence[Mapping[str, Any]] | dict[str, Any]) -> dict[str, Any]:
    """The same for images of another size than the weights': the position embeddings are interpolated."""
    return {**collate(rows), "interpolate_pos_encoding": True}
