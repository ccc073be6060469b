"""A head start: what it trains, what it leaves alone, and when there is none."""

import copy
import logging

import pytest
import torch
from support.helpers import assert_same_weights, losses, manual, pixel_dataset, run, tiny_vit, weights
from support.pretrained import settle
from support.token_rows import Pad, Texts, bert
from transformers import TrainerCallback

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer


def pretrained():
    return settle(tiny_vit())


def config(**settings):
    return manual("1:2", **{"codec": "fp32", "cache": "never", "head_start_epochs": 2, **settings})


class AtFirstStep(TrainerCallback):
    """Copies the weights that the first step begins with."""

    weights = None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.weights is None:
            self.weights = copy.deepcopy(model.state_dict())


def started(folder, settings, model=None, **more):
    seen = AtFirstStep()
    model = pretrained() if model is None else model
    trainer = run(model, pixel_dataset(64), folder, settings, callbacks=[seen], **more)
    return trainer, seen.weights


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_the_head_alone_is_trained_and_is_better(tmp_path):
    plain, before = started(tmp_path / "plain", config(head_start_epochs=0))
    trainer, after = started(tmp_path / "started", config())
    assert changed(before, after) == {"classifier.weight", "classifier.bias"}
    assert losses(trainer)[0] < losses(plain)[0]


@pytest.mark.parametrize("cache", ["never", "always"])
def test_the_training_behind_it_is_that_of_a_model_with_such_a_head(cache, tmp_path):
    """Nothing but the head's weights is left of it: no generator, no buffer, no state of the optimizer, no step."""
    trainer, after = started(tmp_path / "started", config(cache=cache))
    model = pretrained()
    model.load_state_dict(after)
    other, _ = started(tmp_path / "other", config(cache=cache, head_start_epochs=0), model)
    assert losses(trainer) == losses(other)
    assert_same_weights(weights(trainer), weights(other))
    assert trainer.state.global_step == other.state.global_step
    assert [entry.keys() for entry in trainer.state.log_history] == [entry.keys() for entry in other.state.log_history]


def test_without_freezing_it_is_a_plain_training_of_a_model_with_such_a_head(tmp_path):
    trainer, after = started(tmp_path / "started", FreezeCacheConfig(policy="none", head_start_epochs=2))
    assert trainer.freeze_cache_report().phases[0].mode == "head_start"
    model = pretrained()
    assert changed(model.state_dict(), after) == {"classifier.weight", "classifier.bias"}
    model.load_state_dict(after)
    other, _ = started(tmp_path / "other", FreezeCacheConfig(policy="none"), model)
    assert losses(trainer) == losses(other)
    assert_same_weights(weights(trainer), weights(other))


def test_what_it_cost_is_in_the_report(tmp_path):
    trainer, _ = started(tmp_path, config())
    report = trainer.freeze_cache_report()
    phase = report.phases[0]
    assert (phase.mode, phase.cut, phase.epochs) == ("head_start", 0, 2) and phase.steps >= 16 and phase.flops > 0
    assert report.totals.head_start_seconds == phase.seconds > 0
    assert report.totals.flops == sum(phase.flops for phase in report.phases)
    assert "head start" in str(report) and "head_start" in str(report)


@pytest.mark.parametrize(
    ("make", "settings", "is_started"),
    [
        (pretrained, {}, True),
        (tiny_vit, {}, False),  # nothing was trained: there is nothing to spare
        (lambda: settle(tiny_vit(), head="none"), {}, False),
        (lambda: settle(tiny_vit(), head="none"), {"head_start": "always"}, True),
        (pretrained, {"head_start_epochs": 0, "head_start": "always"}, False),
    ],
    ids=["new head", "untrained model", "trained head", "always", "off"],
)
def test_which_heads_get_one(make, settings, is_started, tmp_path):
    trainer, after = started(tmp_path, config(**settings), make())
    assert bool(changed(make().state_dict(), after)) == is_started
    assert ("head_start" in [phase.mode for phase in trainer.freeze_cache_report().phases]) == is_started


def test_texts_get_one(tmp_path):
    seen = AtFirstStep()
    model = settle(bert())
    before = copy.deepcopy(model.state_dict())
    settings = dict(data_collator=Pad(), remove_unused_columns=False, callbacks=[seen])
    trainer = run(model, Texts(32), tmp_path, config(head_start_epochs=8, head_start_lr=0.03), **settings)
    assert changed(before, seen.weights) == {"classifier.weight", "classifier.bias"}
    assert trainer.freeze_cache_report().phases[0].mode == "head_start"


def test_the_users_own_loss_trains_the_head(tmp_path):
    class OnlyFirstClass(FreezeCacheTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(pixel_values=inputs["pixel_values"])
            loss = -outputs.logits.log_softmax(-1)[:, 0].mean()
            return (loss, outputs) if return_outputs else loss

    _, after = started(tmp_path, config(head_start_lr=0.03), trainer_class=OnlyFirstClass)
    assert after["classifier.bias"].argmax() == 0 and after["classifier.bias"][0] > 0.05


def test_a_step_that_reads_what_is_before_the_head_is_an_error_before_the_first_step(tmp_path):
    class ReadsImages(FreezeCacheTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            return super().compute_loss(model, inputs) + inputs["pixel_values"].mean()

    seen = AtFirstStep()
    with pytest.raises(ValueError, match="is read"):
        run(pretrained(), pixel_dataset(), tmp_path, config(), trainer_class=ReadsImages, callbacks=[seen])
    assert seen.weights is None


def test_a_head_that_gets_worse_keeps_its_weights(tmp_path, caplog):
    _, after = started(tmp_path, config(head_start_lr=1e4))
    assert not changed(pretrained().state_dict(), after)
    assert any("weights were put back" in record.message for record in caplog.records)


def test_of_one_batch_nothing_is_held_out(tmp_path, caplog):
    caplog.set_level("INFO", logger="hf_freezecache")
    logging.getLogger("hf_freezecache").propagate = True
    run(pretrained(), pixel_dataset(8), tmp_path, config(head_start_epochs=20))
    assert "on features of 8 samples, learning rate 0.001" in caplog.text


def test_resumed_trainings_get_none(tmp_path):
    settings = dict(save_strategy="epoch", num_train_epochs=3)
    whole, _ = started(tmp_path / "run", config(), **settings)
    seen = AtFirstStep()
    checkpoint = str(tmp_path / "run" / "checkpoint-8")
    resumed = run(
        pretrained(), pixel_dataset(64), tmp_path / "run", config(), resume=checkpoint, callbacks=[seen], **settings
    )
    assert_same_weights(weights(resumed), weights(whole))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"head_start_epochs": -1}, "number of epochs"),
        ({"head_start_epochs": True}, "number of epochs"),
        ({"head_start_lr": 0.0}, "more than 0"),
        ({"head_start": "old"}, "new, always"),
    ],
)
def test_settings_that_are_not_possible(settings, words):
    with pytest.raises(ValueError, match=words):
        FreezeCacheConfig(**settings)
