"""Trainings of models that nobody declared: on features as with frozen blocks on the samples, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.helpers import CLASSES, losses, manual, run
from torch import nn
from torch.utils.data import Dataset, default_collate

from hf_freezecache import FreezeCacheConfig
from tests.support.model_zoo import ENTRIES, QUICK, Entry

#: Not of one crossing tensor.
TRAINED = [name for name in QUICK if name != "timm/crossvit"]
#: One of every other kind of wiring, in the slow suite.
SLOW = [name for name in ENTRIES if name not in QUICK and name.split("/")[0] in ("image", "audio", "causal")]
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


def loss_of_logits(outputs, labels, num_items_in_batch=None) -> torch.Tensor:
    """The loss of models that compute none; what a model without a head answers has as many values as classes."""
    logits = outputs["logits"] if "logits" in outputs else next(iter(outputs.values()))
    return nn.functional.cross_entropy(logits.flatten(1), labels)


def train(entry: Entry, folder, config: FreezeCacheConfig, **settings):
    rows = Rows(entry)
    if not rows.has_labels:
        settings["compute_loss_func"] = loss_of_logits
    return run(
        entry.make(),
        rows,
        folder,
        config,
        data_collator=default_collate,
        num_train_epochs=3,
        remove_unused_columns=False,
        label_names=["labels"],
        **settings,
    )


def assert_cached_equals_frozen(entry: Entry, folder) -> None:
    points = "1:1" if entry.family in ONE_BLOCK else "1:2"
    frozen = train(entry, folder / "frozen", manual(points, cache="never"))
    cached = train(entry, folder / "cached", manual(points, codec="fp32", on_mismatch="error"))
    assert cached.freeze_status().replaying
    assert losses(cached) == losses(frozen) and len(losses(frozen)) == 6
    weights = dict(frozen.model.named_parameters())
    different = [name for name, value in cached.model.named_parameters() if not torch.equal(value, weights[name])]
    assert not different


@pytest.mark.parametrize("name", TRAINED)
def test_training_on_features_is_the_frozen_training_on_samples(name, tmp_path):
    assert_cached_equals_frozen(ENTRIES[name], tmp_path)


def test_checkpoint_of_other_blocks_is_refused(tmp_path):
    """Blocks are found in a run: a cut of a checkpoint must mean what it meant."""
    entry, settings = ENTRIES["torchvision/densenet"], {"save_strategy": "epoch"}
    names = train(entry, tmp_path, manual("1:2"), **settings).freeze_status().frozen_blocks
    settings["resume"] = str(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match=rf"has frozen 2 of .* up to '{names[1]}'.*other blocks now.*blocks=\["):
        other = manual("1:2", blocks=["model.features.denseblock1", "model.features.denseblock2"])
        train(entry, tmp_path, other, **settings)
    assert train(entry, tmp_path, manual("1:2"), **settings).freeze_status().frozen_blocks == names


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_training_of_every_family_is_the_frozen_training_on_samples(name, tmp_path):
    assert_cached_equals_frozen(ENTRIES[name], tmp_path)
