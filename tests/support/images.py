"""Small pictures whose class shows, and transforms of every kind for them."""

from __future__ import annotations

from collections.abc import Callable

import datasets
import numpy as np
import torch
from torchvision import transforms as v1
from torchvision.transforms import v2

from hf_freezecache import ReplayableTransform
from hf_freezecache.augment.geometry import PROJECTIVE, cell_centres, encode_geometry
from support.helpers import CLASSES

TO_PIXELS = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]


def identity_geometry(count: int, kind: str, grid: tuple[int, int]) -> torch.Tensor:
    """`count` equal rows of a view that shows what its base view shows."""
    row = torch.eye(3).flatten()[:8] if kind == PROJECTIVE else encode_geometry(cell_centres(grid), kind, grid, 1.0)
    return row.repeat(count, 1)


def picture_dataset(rows: int = 32, size: int = 16, seed: int = 0) -> datasets.Dataset:
    """Noisy pictures, brighter with their class; columns `image` and `labels`."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, CLASSES, rows)
    pixels = generator.integers(0, 120, (rows, size, size, 3)) + 25 * labels[:, None, None, None]
    features = datasets.Features(image=datasets.Image(), labels=datasets.Value("int64"))
    return datasets.Dataset.from_dict({"image": list(pixels.astype(np.uint8)), "labels": labels}, features=features)


def crop_and_flip(size: int = 16, padding: int = 2) -> v2.Compose:
    return v2.Compose([v2.RandomCrop(size, padding=padding), v2.RandomHorizontalFlip(), *TO_PIXELS])


def replayable(train: v2.Transform | None = None, size: int = 16) -> ReplayableTransform:
    return ReplayableTransform(train=crop_and_flip(size) if train is None else train, base=v2.Compose(TO_PIXELS))


def pictures_with_a_marked_one(marked: int, rows: int = 50) -> datasets.Dataset:
    """Pictures of which a single one has a white corner."""

    def mark(row, index):
        image = np.array(row["image"])
        image[0, 0] = 255 if index == marked else 0
        return {"image": image}

    dataset = picture_dataset(rows)
    return dataset.map(mark, with_indices=True, keep_in_memory=True, features=dataset.features)


class FlipAndErase:
    """Flips at random, and blanks the left half of images that have a white corner: no homography does that."""

    def __call__(self, image, grid=None):
        marked = np.array(image)[0, 0].min() == 255
        pixels = v2.Compose(TO_PIXELS)(image)
        flip = v2.RandomHorizontalFlip()
        pixels, grid = (flip(pixels), None) if grid is None else flip(pixels, grid)
        if marked:
            pixels = v2.functional.erase(pixels, 0, 0, 16, 8, torch.zeros(1))
        if grid is None:
            return pixels
        return pixels, v2.functional.erase(grid, 0, 0, 16, 8, torch.zeros(1)) if marked else grid


class OpaqueFlip:
    """A plain function of rows that flips every image with probability one half."""

    def __call__(self, rows):
        pixels = [v2.Compose([v2.RandomHorizontalFlip(), *TO_PIXELS])(image) for image in rows["image"]]
        return {"pixel_values": pixels, "labels": rows["labels"]}


def official_functions(size: int = 16) -> tuple[Callable, Callable]:
    """The two functions of Transformers' `run_image_classification.py`, for the column `image`."""
    normalize = v1.Normalize(mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25])
    _train_transforms = v1.Compose([v1.RandomResizedCrop(size), v1.RandomHorizontalFlip(), v1.ToTensor(), normalize])
    _val_transforms = v1.Compose([v1.Resize(size), v1.CenterCrop(size), v1.ToTensor(), normalize])

    def train_transforms(example_batch):
        """Apply _train_transforms across a batch."""
        example_batch["pixel_values"] = [
            _train_transforms(pil_img.convert("RGB")) for pil_img in example_batch["image"]
        ]
        return example_batch

    def val_transforms(example_batch):
        """Apply _val_transforms across a batch."""
        images = example_batch["image"]
        example_batch["pixel_values"] = [_val_transforms(pil_img.convert("RGB")) for pil_img in images]
        return example_batch

    return train_transforms, val_transforms


def official_collate(examples):
    """The collator of the same script."""
    pixel_values = torch.stack([example["pixel_values"] for example in examples])
    return {"pixel_values": pixel_values, "labels": torch.tensor([example["labels"] for example in examples])}
