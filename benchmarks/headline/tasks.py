"""The tasks: training, validation and test samples, a new model, and what all arms share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2
from transformers import DataCollatorWithPadding, PreTrainedModel, default_data_collator

from hf_freezecache import ReplayableTransform

from .._images import (
    FINISH,
    Pixels,
    as_batch,
    as_interpolated_batch,
    load_caltech,
    load_caltech_files,
    load_cifar10,
    load_deit,
)
from .._resnet import CifarResNet, block_names
from ..text.sources import load_minilm, load_questions, tokenized

#: Share of the training samples by which learning rates are chosen. All sets are shuffled.
VALIDATION = 0.2
#: Learning rates that every arm is tried with first, of all parameters or of what was added to a frozen model.
RATES = (1e-4, 2e-4, 4e-4)
RATES_OF_TEXTS = (2e-4, 4e-4, 8e-4)
RATES_FROM_SCRATCH = (2e-3, 4e-3, 8e-3)
RATES_OF_FEW = (1e-3, 2e-3, 4e-3)
_TO_TENSOR = [v2.PILToTensor(), *FINISH]
#: Linear layers that LoRA adapts, by the end of their names.
ADAPTED = ["query", "value", "q_proj", "v_proj"]


@dataclass(frozen=True)
class Task:
    """What is learned.

    Args:
        name: in tables and files.
        train: all training samples.
        test: evaluated once at the end of a training.
        load_model: makes the model, with a new head.
        collator: makes batches of samples.
        batch_size: of training steps.
        blocks: `len(chain)` of the model.
        half: the cut that the arms call half: about half of the blocks.
        deep: the cut that the arms call deep.
        rates: learning rates that are tried first, of all parameters.
        epochs: how many epochs stand for one of an arm: networks without pretrained weights take more.
        is_pretrained: whether the model has learned something before.
        has_all_arms: whether all arms are trained, or those alone that every task has.
    """

    name: str
    train: Dataset
    test: Dataset
    load_model: Callable[[], PreTrainedModel | CifarResNet]
    collator: Callable
    batch_size: int
    blocks: int
    half: int
    deep: int
    rates: tuple[float, ...] = RATES
    epochs: int = 1
    is_pretrained: bool = True
    has_all_arms: bool = False

    def split(self) -> tuple[Dataset, Dataset]:
        """The training samples without those for validation, and these."""
        first = round(len(self.train) * (1 - VALIDATION))
        return _part(self.train, 0, first), _part(self.train, first, len(self.train))


def _part(dataset: Any, start: int, end: int) -> Dataset:
    if isinstance(dataset, Pixels):
        return Pixels(dataset.pixel_values[start:end], dataset.labels[start:end])
    return dataset.select(range(start, end))


def load_task(name: str, options: argparse.Namespace) -> Task:
    """One of `TASKS`, with its data in memory."""
    return TASKS[name](name, options)


def _caltech(name: str, options: argparse.Namespace, size: int, rotated: bool = False) -> Task:
    train, test = (
        load_caltech(options, split, size, rows)
        for split, rows in (("train", options.rows), ("test", options.test_rows))
    )
    if rotated:
        train, test = _rotated(train, seed=1), _rotated(test, seed=2)
    collator = as_batch if size == 224 else as_interpolated_batch
    classes = {"classes": 4} if rotated else {}
    return Task(
        name,
        train,
        test,
        lambda: load_deit(options, **classes),
        collator,
        options.batch_size,
        13,
        6,
        10,
        has_all_arms=not rotated,
    )


def _rotated(images: Pixels, seed: int) -> Pixels:
    """Every image turned by a multiple of 90 degrees, which is its class."""
    turns = torch.randint(4, (len(images),), generator=torch.Generator().manual_seed(seed))
    pixels = torch.stack(
        [image.rot90(int(turn), (1, 2)) for image, turn in zip(images.pixel_values, turns, strict=True)]
    )
    return Pixels(pixels, turns)


def _augmented(name: str, options: argparse.Namespace, size: int) -> Task:
    base = v2.Compose(
        [
            v2.Resize(size * 8 // 7, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(size),
            *_TO_TENSOR,
        ]
    )
    crop = v2.RandomResizedCrop(size, scale=(0.35, 1), interpolation=InterpolationMode.BICUBIC, antialias=True)
    random = v2.Compose([crop, v2.RandomHorizontalFlip(), *_TO_TENSOR])
    train, test = (
        load_caltech_files(options, "train", options.rows),
        load_caltech_files(options, "test", options.test_rows),
    )
    collator = default_data_collator if size == 224 else _interpolated
    return Task(
        name,
        train.with_transform(ReplayableTransform(train=random, base=base)),
        test.with_transform(ReplayableTransform(train=base, base=base)),
        lambda: load_deit(options),
        collator,
        options.batch_size,
        13,
        6,
        10,
    )


def _interpolated(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return as_interpolated_batch(default_data_collator(rows))


def _banking(name: str, options: argparse.Namespace) -> Task:
    _, tokenizer = load_minilm(options)
    train = tokenized(load_questions(options, "train").shuffle(seed=0), tokenizer)
    test = tokenized(load_questions(options, "test"), tokenizer)
    train = train.select(range(min(len(train), options.rows or 4000)))
    test = test.select(range(min(len(test), options.test_rows or len(test))))
    collator = DataCollatorWithPadding(tokenizer)
    return Task(
        name, train, test, lambda: load_minilm(options)[0], collator, options.batch_size, 7, 4, 5, RATES_OF_TEXTS
    )


def _from_scratch(name: str, options: argparse.Namespace) -> Task:
    base = v2.Compose(_TO_TENSOR)
    random = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *_TO_TENSOR])
    train, test = (
        load_cifar10(options, split, rows).rename_column("label", "labels").with_transform(transform)
        for split, rows, transform in (
            ("train", options.rows or 5000, ReplayableTransform(train=random, base=base)),
            ("test", options.test_rows or 2000, ReplayableTransform(train=base, base=base)),
        )
    )
    return Task(
        name,
        train,
        test,
        lambda: CifarResNet(20),
        default_data_collator,
        4 * options.batch_size,
        len(block_names(20)),
        5,
        8,
        RATES_FROM_SCRATCH,
        epochs=5,
        is_pretrained=False,
    )


TASKS: dict[str, Callable[[str, argparse.Namespace], Task]] = {
    "caltech-224": lambda name, options: _caltech(name, options, 224),
    "caltech-224-augmented": lambda name, options: _augmented(name, options, 224),
    "caltech-112": lambda name, options: _caltech(name, options, 112),
    "caltech-112-augmented": lambda name, options: _augmented(name, options, 112),
    "orientation-224": lambda name, options: _caltech(name, options, 224, rotated=True),
    "banking77": _banking,
    "cifar10-resnet20": _from_scratch,
}
