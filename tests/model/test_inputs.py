"""Which entries of a batch the prefix gets."""

import pytest
import torch
from support.helpers import tiny_vit
from torch import nn

from hf_freezecache.model.inputs import ModelInputs


class TakesPixels(nn.Module):
    def forward(self, pixel_values, mask=None):
        return pixel_values


def test_labels_and_what_the_model_does_not_take_are_left_out():
    batch = {"pixel_values": torch.randn(2, 3), "labels": torch.tensor([0, 1]), "path": ["a", "b"], "mask": None}
    inputs = ModelInputs(TakesPixels(), dict, ["labels"])
    inputs.include_labels_if_needed(batch)
    assert set(inputs(batch)) == {"pixel_values", "mask"}


class NeedsLabels(nn.Module):
    main_input_name = "x"

    def forward(self, x, labels):
        if labels.shape[0] != x.shape[0]:
            raise ValueError("one label a row")
        return x + labels[:, None]


def test_model_that_does_not_run_without_labels_gets_them(caplog):
    caplog.set_level("INFO", logger="hf_freezecache")
    inputs = ModelInputs(NeedsLabels(), dict, ["labels"])
    inputs.include_labels_if_needed({"x": torch.zeros(2, 3), "labels": torch.ones(2)})
    assert set(inputs({"x": torch.zeros(2, 3), "labels": torch.ones(2)})) == {"x", "labels"}
    assert "does not run without its labels (TypeError" in caplog.text


def test_model_that_runs_neither_way_raises_what_a_training_would():
    inputs = ModelInputs(NeedsLabels(), dict, ["labels"])
    with pytest.raises(ValueError, match="one label a row"):
        inputs.include_labels_if_needed({"x": torch.zeros(2, 3), "labels": torch.ones(3)})
    assert inputs.label_names == {"labels"}


def test_model_that_takes_everything_gets_everything_but_labels():
    class Takes(nn.Module):
        def forward(self, x, **others):
            return x

    assert set(ModelInputs(Takes(), dict, ["labels"])({"x": 1, "labels": 2, "mask": 3})) == {"x", "mask"}


def test_batch_moves_to_the_models_device():
    inputs = ModelInputs(tiny_vit(), lambda batch: {name: value.double() for name, value in batch.items()}, ["labels"])
    assert inputs({"pixel_values": torch.zeros(1)})["pixel_values"].dtype == torch.float64
