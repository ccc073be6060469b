"""Small pictures whose class shows, and transforms of every kind for them."""

from __future__ import annotations

import datasets
import numpy as np
import torch
from helpers import CLASSES
from torchvision.transforms import v2

from hf_freezecache import ReplayableTransform

TO_PIXELS = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]


def picture_dataset(rows: int = 32, size: int = 16, seed: int = 0) -> datasets.Dataset:
    """Noisy pictures, brighter with their class; columns `image` and `labels`."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, CLASSES, rows)
    pixels = generator.integers(0, 120, (rows, size, size, 3)) + 25 * labels[:, None, None, None]
    features = datasets.Features(image=datasets.Image(), labels=datasets.Value("int64"))
    return datasets.Dataset.from_dict({"image": list(pixels.astype(np.uint8)), "labels": labels}, features=features)


def crop_and_flip(size: int = 16, padding: int = 2) -> v2.Compose:
    return v2.Compose([v2.RandomCrop(size, padding=padding), v2.RandomHorizontalFlip(), *TO_PIXELS])


def replayable(train: v2.Transform | None = None) -> ReplayableTransform:
    return ReplayableTransform(train=crop_and_flip() if train is None else train, base=v2.Compose(TO_PIXELS))


class OpaqueFlip:
    """A plain function of rows that flips every image with probability one half."""

    def __call__(self, rows):
        pixels = [v2.Compose([v2.RandomHorizontalFlip(), *TO_PIXELS])(image) for image in rows["image"]]
        return {"pixel_values": pixels, "labels": rows["labels"]}
