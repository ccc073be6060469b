"""Trainings with one frozen part that differ in dropout, or in the classes of the head: they read one store."""

import pytest
import torch
from support.helpers import assert_same_weights, losses, manual, messages, pixel_dataset, run, tiny_vit, weights
from torch import nn

ROWS = 40


def vit(scale=None, **settings):
    """The same weights before the head, whatever its classes; `scale` is called on each block's input."""
    model, given = tiny_vit(**settings), tiny_vit().state_dict()
    model.load_state_dict({name: value for name, value in given.items() if "classifier" not in name}, strict=False)
    if scale is not None:
        model.vit.layers[0].dropout = scale(model)
    return model


def stores(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_as_frozen(make, tmp_path, **settings):
    """Trains on features, and with frozen blocks on samples: the same to the last bit."""
    config = manual("0:2", codec="fp32", feature_cache_dir=str(tmp_path / "shared"))
    cached = run(make(), pixel_dataset(ROWS), tmp_path / "run", config, num_train_epochs=2, **settings)
    frozen = run(make(), pixel_dataset(ROWS), tmp_path / "frozen", manual("0:2", cache="never"), num_train_epochs=2)
    assert cached.freeze_status().replaying
    assert losses(cached) == losses(frozen)
    assert_same_weights(weights(cached), weights(frozen))


SWEEP = {
    "classes": dict(num_labels=7),
    "names of classes": dict(id2label={number: f"class {number}" for number in range(5)}),
    "problem type": dict(problem_type="single_label_classification"),
    "dropout": dict(hidden_dropout_prob=0.2),
    "no dropout": dict(hidden_dropout_prob=0.0),
    "dropout of attentions": dict(attention_probs_dropout_prob=0.3),
}


def test_dropout_and_classes_of_the_head_cost_one_build(tmp_path, caplog):
    assert_as_frozen(vit, tmp_path)
    for settings in SWEEP.values():
        assert_as_frozen(lambda settings=settings: vit(**settings), tmp_path)
    assert len(stores(tmp_path / "shared")) == 1
    assert messages(caplog).count("Built the feature store") == 1


def test_resumed_training_with_other_dropout_goes_on_from_the_store(tmp_path):
    config = manual("0:2", codec="fp32")
    run(vit(), pixel_dataset(ROWS), tmp_path, config, save_strategy="epoch", num_train_epochs=2)
    before = stores(tmp_path / "_freeze_cache")
    checkpoint = str(tmp_path / "checkpoint-5")
    model = vit(hidden_dropout_prob=0.3)
    trainer = run(model, pixel_dataset(ROWS), tmp_path, config, resume=checkpoint, num_train_epochs=2)
    assert trainer.freeze_status().replaying and stores(tmp_path / "_freeze_cache") == before


class Noting(nn.Module):
    """Notes the mean of each sample."""

    def __init__(self, means):
        super().__init__()
        self.means = means

    def forward(self, x):
        self.means.append(x.mean((1, 2)))
        return x


class ScaledByClasses(nn.Module):
    """Reads the number of classes in the middle of the frozen part."""

    def __init__(self, model, least=float("-inf")):
        super().__init__()
        self.config, self.least = model.config, least

    def forward(self, x):
        scaled = x * (1 + self.config.num_labels / 10)
        return torch.where(x.mean((1, 2), keepdim=True) > self.least, scaled, x)


class ScaledDropout(nn.Dropout):
    """Makes values as small in eval mode as training leaves them large."""

    def forward(self, x):
        return super().forward(x) if self.training else x * (1 - self.p)


COUNTING = {
    "classes": (ScaledByClasses, dict(num_labels=5), dict(num_labels=7)),
    "dropout": (
        lambda model: ScaledDropout(model.config.hidden_dropout_prob),
        dict(hidden_dropout_prob=0.1),
        dict(hidden_dropout_prob=0.3),
    ),
}


@pytest.mark.parametrize("name", COUNTING)
def test_value_that_the_frozen_part_reads_makes_another_store(name, tmp_path, caplog):
    scale, *both = COUNTING[name]
    for settings in both:
        assert_as_frozen(lambda settings=settings: vit(scale, **settings), tmp_path)
    assert len(stores(tmp_path / "shared")) == 2
    assert "of an earlier run is not used" not in messages(caplog)  # the fingerprint has told them apart


def test_value_that_counts_for_few_samples_is_found_by_the_proof_of_reuse(tmp_path, caplog):
    """None of them is among the samples that are tried before a build."""
    means = []
    model = vit(lambda model: Noting(means))
    with torch.no_grad():
        model.eval()(pixel_values=torch.stack([row["pixel_values"] for row in pixel_dataset(ROWS)]))
    least = float(torch.cat(means).sort().values[-4:].mean())
    for settings in (dict(num_labels=5), dict(num_labels=7)):
        assert_as_frozen(
            lambda settings=settings: vit(lambda model: ScaledByClasses(model, least), **settings), tmp_path
        )
    assert len(stores(tmp_path / "shared")) == 2
    assert "of an earlier run is not used" in messages(caplog)
