"""Trainings of models that nobody declared: on features as with frozen blocks on the samples, bit for bit."""

from __future__ import annotations

import pytest
from support.helpers import manual

from tests.support.found_trainings import assert_cached_equals_frozen, train
from tests.support.model_zoo import ENTRIES, QUICK

TRAINED = list(QUICK)
#: One of every other kind of wiring, in the slow suite.
SLOW = [name for name in ENTRIES if name not in QUICK and name.split("/")[0] in ("image", "audio", "causal")]


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
