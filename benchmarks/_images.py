"""Caltech-101 and CIFAR-10, ImageNet's normalization, and DeiT-Tiny."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset as Rows
from datasets import load_dataset
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2
from transformers import ViTForImageClassification

from ._common import available_cores, shared_folder

CLASSES = 101
WEIGHTS = "deit-tiny-patch16-224"
#: The last steps of a pipeline: floats, normalized with mean and deviation of ImageNet's pixels.
FINISH = [v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
_CIFAR10 = {"train": "train-00000-of-00005.parquet", "test": "test-00000-of-00001.parquet"}


@dataclass(frozen=True)
class Pixels(Dataset):
    """Preprocessed images in memory; a batch is one indexing, so that loading does not blur what is measured.

    Args:
        pixel_values: float32 `(N, 3, H, W)`, or features `(N, T, C)`.
        labels: int64 `(N,)`.
    """

    pixel_values: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        rows = torch.tensor(indices)
        return {"pixel_values": self.pixel_values[rows], "labels": self.labels[rows]}


def as_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """The collator for `Pixels`, whose `__getitems__` returns a batch already."""
    return batch


def as_interpolated_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """The same for images of another size than the weights': the position embeddings are interpolated."""
    return {**batch, "interpolate_pos_encoding": True}


def add_image_options(parser: argparse.ArgumentParser, rows: int, size: int = 224, batch_size: int = 32) -> None:
    """Options of a benchmark on images, with their defaults."""
    parser.add_argument("--image_size", type=int, default=size)
    parser.add_argument("--batch_size", type=int, default=batch_size)
    parser.add_argument("--rows", type=int, default=rows, help="training images")


def load_cifar10(options: argparse.Namespace, split: str, rows: int | None = None) -> Rows:
    """The first rows of CIFAR-10 (balanced by class), with columns `image` and `label`.

    Args:
        options: with `shared`.
        split: train (a fifth of it) or test.
        rows: all if None.
    """
    return _load_rows(shared_folder(options, "data", "cifar10", _CIFAR10[split]), rows)


def load_caltech_files(options: argparse.Namespace, split: str, rows: int | None = None) -> Rows:
    """The first rows of Caltech-101 (shuffled, balanced by class), with columns `image` and `label`."""
    return _load_rows(shared_folder(options, "data", "caltech101", f"{split}.parquet"), rows)


def _load_rows(path: Path, rows: int | None) -> Rows:
    dataset = load_dataset("parquet", data_files=str(path), split="train")
    return dataset if rows is None else dataset.select(range(min(rows, len(dataset))))


def load_caltech(options: argparse.Namespace, split: str, size: int, rows: int | None = None) -> Pixels:
    """The first rows of Caltech-101 as pixels: the shorter side resized to 8/7 of `size`, then the centre crop.

    Args:
        options: with `shared`.
        split: train or test.
        size: of the crop.
        rows: all if None.
    """
    dataset = load_caltech_files(options, split, rows)
    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(size * 8 // 7, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(size),
            *FINISH,
        ]
    )
    pixels = torch.empty(len(dataset), 3, size, size)

    def read(row: int) -> None:
        pixels[row] = transform(dataset[row]["image"].convert("RGB"))

    with ThreadPoolExecutor(available_cores()) as pool:
        list(pool.map(read, range(len(dataset))))
    return Pixels(pixels, torch.tensor(dataset["label"]))


def load_deit(options: argparse.Namespace, classes: int | None = CLASSES) -> ViTForImageClassification:
    """DeiT-Tiny with ImageNet weights.

    Args:
        options: with `shared`.
        classes: of a fresh head, drawn from torch's generator; None: the head that the weights were trained with.
    """
    folder = shared_folder(options, "weights", WEIGHTS)
    head = {} if classes is None else {"num_labels": classes, "ignore_mismatched_sizes": True}
    return ViTForImageClassification.from_pretrained(folder, local_files_only=True, **head)
