"""A head start where nobody has asked for one: under the rules that choose by themselves what freezes."""

import pytest
import torch
from support.helpers import assert_same_weights, manual, messages, pixel_dataset, run, tiny_vit
from support.pretrained import settle
from test_head_start import changed, started
from torch import nn

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer, FreezePolicy, ZeroOrderTrainer
from hf_freezecache.cache.manifest import StoreError
from hf_freezecache.cache.shelf import TensorShelf
from hf_freezecache.config import HEAD_START_EPOCHS
from hf_freezecache.training.settings import read_settings


class Never(FreezePolicy):
    name = "never"

    def decide(self, moment):
        return 0


def modes(trainer):
    return [phase.mode for phase in trainer.freeze_cache_report().phases]


@pytest.mark.parametrize(
    ("settings", "policy", "epochs"),
    [
        (None, None, HEAD_START_EPOCHS),
        (None, "auto", HEAD_START_EPOCHS),
        (None, "egeria", HEAD_START_EPOCHS),
        (FreezeCacheConfig(), None, HEAD_START_EPOCHS),
        (FreezeCacheConfig(), Never(), 0),
        (FreezeCacheConfig(head_start_epochs=3), Never(), 3),
        (FreezeCacheConfig(), "none", 0),
        (None, "none", 0),
        (manual("0:2"), None, 0),
        (FreezeCacheConfig(head_start_epochs=0), None, 0),
    ],
)
def test_rules_that_choose_what_freezes_have_one(settings, policy, epochs):
    assert read_settings(settings, policy)[0].epochs_of_head_start == epochs


def test_the_default_training_of_a_new_head_begins_with_it_and_says_so(tmp_path, caplog):
    trainer, before = started(tmp_path / "default", None)
    assert modes(trainer)[0] == "head_start"
    assert changed(settle(tiny_vit()).state_dict(), before) == {"classifier.weight", "classifier.bias"}
    told = messages(caplog)
    before = told.index("the new head learns alone: classifier.weight, classifier.bias. For that 64 samples run once")
    assert before < told.index("Head start: classifier.weight, classifier.bias trained alone")


def test_a_head_that_is_not_new_or_a_model_that_is_has_none(tmp_path):
    for name, model in (("settled", settle(tiny_vit(), head="none")), ("untrained", tiny_vit())):
        trainer, _ = started(tmp_path / name, FreezeCacheConfig(), model)
        assert "head_start" not in modes(trainer)


class FailsOnFeatures(FreezeCacheTrainer):
    """Its loss fails after a few steps of the head alone."""

    calls = 0

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self._session is not None and self._session.head_start.is_running:
            self.calls += 1
            if self.calls == 12:
                raise RuntimeError("no more losses")
        return loss


def test_one_that_fails_leaves_the_head_as_it_was_and_the_training_goes_on(tmp_path, caplog):
    _, without = started(tmp_path / "without", FreezeCacheConfig(head_start_epochs=0))
    trainer, before = started(tmp_path / "fails", None, trainer_class=FailsOnFeatures)
    assert_same_weights(before, without)
    assert trainer.state.global_step == trainer.state.max_steps
    assert "The head does not learn alone before the training" in messages(caplog)


def test_one_that_is_asked_for_fails_in_words_and_leaves_the_head_as_it_was(tmp_path):
    model = settle(tiny_vit())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="of the head alone fails with no more losses"):
        started(tmp_path, FreezeCacheConfig(head_start_epochs=2), model, trainer_class=FailsOnFeatures)
    assert_same_weights(before, model.state_dict())


@pytest.mark.parametrize("error", [OSError("the disk fails"), StoreError("damaged")])
def test_a_fault_of_the_disk_costs_no_training(error, tmp_path, caplog, monkeypatch):
    def fails(*args):
        raise error

    _, without = started(tmp_path / "without", FreezeCacheConfig(head_start_epochs=0))
    monkeypatch.setattr(TensorShelf, "add", fails)
    trainer, before = started(tmp_path / "fails", None)
    assert_same_weights(before, without)
    assert trainer.state.global_step == trainer.state.max_steps
    assert f"The head does not learn alone before the training: {error} ({type(error).__name__})" in messages(caplog)


def test_a_zeroth_order_training_follows_no_gradients_of_the_head(tmp_path):
    trainer = run(settle(tiny_vit()), pixel_dataset(64), tmp_path, None, trainer_class=ZeroOrderTrainer)
    assert "head_start" not in modes(trainer)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


class Remembers(nn.Module):
    """Makes a new buffer in the place of the old one, and counts, in every forward pass of a training."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(768, 8), nn.Linear(8, 5)
        self.register_buffer("seen", torch.empty(0))
        self.passes = 0

    def forward(self, pixel_values, labels=None):
        if self.training:
            self.seen, self.passes = torch.cat([self.seen, labels.float()]), self.passes + 1
        logits = self.head(self.stem(pixel_values.flatten(1)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("policy", ["linear", "auto"])
def test_what_a_model_remembers_is_that_of_its_training_alone(policy, tmp_path):
    trainer = run(Remembers(), pixel_dataset(160), tmp_path, FreezeCacheConfig(policy=policy), num_train_epochs=8)
    assert "head_start" in modes(trainer) and ("trial" in modes(trainer)) == (policy == "auto")
    assert trainer.model.passes == trainer.state.global_step == 160
    assert len(trainer.model.seen) == 8 * 160
