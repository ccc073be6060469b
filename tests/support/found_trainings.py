"""Trainings of models of the zoo, whose blocks are found: with frozen blocks on samples, and on features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, default_collate

from hf_freezecache import FreezeCacheConfig
from support.helpers import CLASSES, losses, manual, run

from .model_zoo import Entry

Change = Callable[[nn.Module], nn.Module]
#: Families whose first layer reads what later ones read as well: they can be frozen up to it, or as a whole.
ONE_BLOCK = ("perceiver",)


class Rows(Dataset):
    """Samples of a model of the zoo, of one length; those of models that take no labels get some."""

    def __init__(self, entry: Entry, rows: int = 16):
        self.batch, self.rows = entry.inputs(rows=rows, seed=5), rows
        self.has_labels = any(name in self.batch for name in ("labels", "start_positions"))
        if not self.has_labels:
            self.batch["labels"] = torch.arange(rows) % CLASSES

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: value[row] for name, value in self.batch.items()}


def unchanged(model: nn.Module) -> nn.Module:
    return model


def loss_of_logits(outputs, labels, num_items_in_batch=None) -> torch.Tensor:
    """The loss of models that compute none; what a model without a head answers has as many values as classes."""
    logits = outputs["logits"] if "logits" in outputs else next(iter(outputs.values()))
    return nn.functional.cross_entropy(logits.flatten(1), labels)


def train(entry: Entry, folder, config: FreezeCacheConfig | None, change: Change = unchanged, **settings):
    """Trains a model of the zoo on samples of one length.

    Args:
        entry: the model.
        folder: for what the training writes.
        config: settings; None: the defaults.
        change: makes the model that is trained of the tiny one.
        settings: as of `support.helpers.run`.
    """
    rows = Rows(entry)
    if not rows.has_labels:
        settings["compute_loss_func"] = loss_of_logits
    return run(
        change(entry.make()),
        rows,
        folder,
        config,
        **{
            "data_collator": default_collate,
            "num_train_epochs": 3,
            "remove_unused_columns": False,
            "label_names": ["labels"],
            **settings,
        },
    )


def assert_cached_equals_frozen(entry: Entry, folder, change: Change = unchanged, **settings):
    """Trains with frozen blocks on samples, and on features: losses and weights are the same bit for bit.

    Returns:
        The trainer of the training on features.
    """
    points = "1:1" if entry.family in ONE_BLOCK else "1:2"
    frozen = train(entry, folder / "frozen", manual(points, cache="never"), change, **settings)
    cached = train(entry, folder / "cached", manual(points, codec="fp32", on_mismatch="error"), change, **settings)
    assert cached.freeze_status().replaying
    assert losses(cached) == losses(frozen) and len(losses(frozen)) == 6
    weights = dict(frozen.model.named_parameters())
    different = [name for name, value in cached.model.named_parameters() if not torch.equal(value, weights[name])]
    assert not different
    return cached
