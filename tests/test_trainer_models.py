"""Trainings of models that nobody declared: on features as with frozen blocks on the samples, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.helpers import losses, manual, run
from torch.utils.data import Dataset, default_collate

from hf_freezecache import FreezeCacheConfig
from tests.support.model_zoo import ENTRIES, QUICK, Entry

TRAINED = list(QUICK)
#: One of every other kind of wiring, in the slow suite.
SLOW = [name for name in ENTRIES if name not in QUICK and name.split("/")[0] in ("image", "audio", "causal")]


class Rows(Dataset):
    """Samples of a model of the zoo, of one length."""

    def __init__(self, entry: Entry, rows: int = 16):
        self.batch, self.rows = entry.inputs(rows=rows, seed=5), rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: value[row] for name, value in self.batch.items()}


def train(entry: Entry, folder, config: FreezeCacheConfig, **settings):
    return run(
        entry.make(),
        Rows(entry),
        folder,
        config,
        data_collator=default_collate,
        num_train_epochs=3,
        remove_unused_columns=False,
        label_names=["labels"],
        **settings,
    )


def assert_cached_equals_frozen(entry: Entry, folder) -> None:
    frozen = train(entry, folder / "frozen", manual("1:2", cache="never"))
    cached = train(entry, folder / "cached", manual("1:2", codec="fp32", on_mismatch="error"))
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
