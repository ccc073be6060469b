"""Images of several sizes, and what puts those of one size into a batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Dataset, Sampler
from transformers import default_data_collator

from hf_freezecache import FreezeCacheTrainer

from .helpers import CLASSES, make_args

#: Heights and widths.
SIZES = ((32, 32), (32, 48), (64, 32), (48, 48))


class SizedImages(Dataset):
    """Images, each of the next size, or so many of one size after the other.

    Args:
        rows: number of images.
        sizes: heights and widths.
        in_a_row: images of one size that lie beside each other.
    """

    def __init__(self, rows: int = 32, sizes=SIZES, in_a_row: int = 1):
        generator = torch.Generator().manual_seed(0)
        self.sizes = [sizes[row // in_a_row % len(sizes)] for row in range(rows)]
        self.images = [torch.randn(3, *size, generator=generator) for size in self.sizes]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int):
        return {"pixel_values": self.images[row], "labels": row % CLASSES}


class GroupedBySize(Sampler):
    """Batches of one size each, in random order, as one row after the other.

    Args:
        sizes: of all rows.
        batch_size: rows of a batch; what is left over of a size is left out.
    """

    def __init__(self, sizes, batch_size: int):
        self.sizes, self.batch_size = sizes, batch_size

    def __len__(self) -> int:
        return sum(self.sizes.count(size) // self.batch_size * self.batch_size for size in dict.fromkeys(self.sizes))

    def __iter__(self) -> Iterator[int]:
        batches = []
        for size in dict.fromkeys(self.sizes):
            rows = torch.tensor([row for row, own in enumerate(self.sizes) if own == size])
            rows = rows[torch.randperm(len(rows))].tolist()
            whole = len(rows) // self.batch_size * self.batch_size
            batches += [rows[first : first + self.batch_size] for first in range(0, whole, self.batch_size)]
        yield from (row for place in torch.randperm(len(batches)).tolist() for row in batches[place])


class GroupingTrainer(FreezeCacheTrainer):
    """Groups images by their size."""

    def _get_train_sampler(self, train_dataset=None):
        return GroupedBySize(self.train_dataset.sizes, self._train_batch_size * self.args.world_size)


def interpolating(samples):
    """A collator whose batches tell a ViT to fit its position embeddings to their size."""
    return {**default_data_collator(samples), "interpolate_pos_encoding": True}


def train_sized(make, images, folder, config, trainer_class=GroupingTrainer, resume=None, **settings):
    """Trains on images of several sizes; keyword arguments named as `Trainer`'s go there."""
    names = ("data_collator", "callbacks", "eval_dataset", "compute_loss_func")
    own = {name: settings.pop(name) for name in names if name in settings}
    settings = {"remove_unused_columns": False, "num_train_epochs": 3, "per_device_train_batch_size": 4, **settings}
    trainer = trainer_class(
        model=make(), args=make_args(folder, **settings), train_dataset=images, freeze_cache=config, **own
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer
