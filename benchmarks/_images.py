"""Caltech-101 as tensors in memory, and DeiT-Tiny."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import load_dataset
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2
from transformers import ViTForImageClassification

from ._common import shared_folder

CLASSES = 101
WEIGHTS = "deit-tiny-patch16-224"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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


def load_caltech(options: argparse.Namespace, split: str, size: int, rows: int | None = None) -> Pixels:
    """The first rows of Caltech-101 (shuffled, balanced by class): short side to 8/7 of `size`, centre crop.

    Args:
        options: with `shared`.
        split: train or test.
        size: of the crop.
        rows: all if None.
    """
    path = shared_folder(options, "data", "caltech101", f"{split}.parquet")
    dataset = load_dataset("parquet", data_files=str(path), split="train")
    dataset = dataset.select(range(min(rows or len(dataset), len(dataset))))
    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(size * 8 // 7, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(_MEAN, _STD),
        ]
    )
    pixels = torch.empty(len(dataset), 3, size, size)
    for row, image in enumerate(dataset["image"]):
        pixels[row] = transform(image.convert("RGB"))
    return Pixels(pixels, torch.tensor(dataset["label"]))


def load_deit(options: argparse.Namespace) -> ViTForImageClassification:
    """DeiT-Tiny with ImageNet weights and a fresh head for Caltech-101, drawn from torch's generator."""
    folder = shared_folder(options, "weights", WEIGHTS)
    return ViTForImageClassification.from_pretrained(
        folder, num_labels=CLASSES, ignore_mismatched_sizes=True, local_files_only=True
    )
