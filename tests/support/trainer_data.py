"""Data sets as users give them to a trainer."""

import datasets
import numpy as np
import torch

from support.helpers import CLASSES


class MixedSizes(torch.utils.data.Dataset):
    """12 images of 32 pixels, then 4 of 64."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        size = 32 if index < 12 else 64
        generator = torch.Generator().manual_seed(index)
        return {
            "pixel_values": torch.randn(3, size, size, generator=generator),
            "labels": torch.tensor(index % CLASSES),
        }


def image_dataset(rows=32, column="image"):
    """Random pictures, and a class label each."""
    generator = np.random.default_rng(0)
    features = datasets.Features({column: datasets.Image(), "label": datasets.ClassLabel(num_classes=CLASSES)})
    images = generator.integers(0, 255, (rows, 16, 16, 3)).astype(np.uint8)
    return datasets.Dataset.from_dict(
        {column: list(images), "label": generator.integers(0, CLASSES, rows)}, features=features
    )


def to_pixels(batch):
    """A transform without chance."""
    pixels = [torch.tensor(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255.0 for image in batch["image"]]
    return {"pixel_values": pixels, "label": batch["label"]}


def own_collator(rows):
    """A collator that renames the label."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["label"] for row in rows]),
    }
