import random
import re

import numpy as np
import pytest
import torch
from support.helpers import make_args, manual, pixel_dataset, tiny_resnet, tiny_vit, weights
from support.pretrained import settle
from support.sessions import session_of
from torch.nn import functional as F
from transformers import TrainerCallback

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer, FreezePolicy
from hf_freezecache.model.stand_ins import StandIn
from hf_freezecache.training.rehearsal import Outcome, find_difference


def outcome(loss=1.0, logits=2.0, **gradients):
    tensors = {name: torch.tensor([value]) for name, value in gradients.items()}
    return Outcome(torch.tensor(loss), {"output.logits": torch.tensor([logits])}, tensors)


def test_equal_outcomes_agree_nan_included():
    assert find_difference(outcome(weight=1.0), outcome(weight=1.0)) is None
    assert find_difference(outcome(loss=float("nan")), outcome(loss=float("nan"))) is None


@pytest.mark.parametrize(
    ("replayed", "message"),
    [
        (outcome(loss=1.5, weight=1.0), "loss is 1 on samples and 1.5 on features"),
        (outcome(logits=2.5, weight=1.0), "output 'output.logits' differs"),
        (outcome(weight=1.5), "gradient of 'weight' differs"),
        (outcome(weight=1.0, bias=1.0), "'bias' gets a gradient from one of them only"),
    ],
)
def test_a_difference_is_named(replayed, message):
    assert re.search(message, find_difference(outcome(weight=1.0), replayed))


def test_tolerance_is_relative_to_the_largest_value():
    assert find_difference(outcome(weight=100.0), outcome(weight=100.5), tolerance=1e-2) is None
    assert find_difference(outcome(weight=100.0), outcome(weight=102.0), tolerance=1e-2) is not None


def test_outputs_that_do_not_exist_on_features_are_left_to_whoever_reads_them():
    hidden = StandIn((1,), torch.float32, torch.device("cpu"), "the output of the frozen block 'stem'")
    replayed = outcome()
    replayed.outputs["output.logits"] = hidden
    assert find_difference(outcome(), replayed) is None


# In a trainer's own path


class Mirrored(FreezeCacheTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(
            model, {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}, *args, **kwargs
        )


class DeepSupervision(FreezeCacheTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, output_hidden_states=True)
        loss = outputs.loss + outputs.hidden_states[1].pow(2).mean()
        return (loss, outputs) if return_outputs else loss


class Distilling(FreezeCacheTrainer):
    teacher = tiny_vit(seed=9).eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        with torch.no_grad():
            target = self.teacher(pixel_values=inputs["pixel_values"]).logits
        loss = outputs.loss + F.mse_loss(outputs.logits, target)
        return (loss, outputs) if return_outputs else loss


class AugmentsOnDevice(FreezeCacheTrainer):
    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        if self.model.training and "pixel_values" in inputs:
            inputs = {
                **inputs,
                "pixel_values": inputs["pixel_values"] + 0.5 * torch.randn(len(inputs["labels"]), 1, 1, 1),
            }
        return inputs


class TouchesImages(FreezeCacheTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        return super().training_step(model, {**inputs, "pixel_values": inputs["pixel_values"] * 0.5}, *args, **kwargs)


class OwnStep(FreezeCacheTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        self.accelerator.backward(loss)
        return loss.detach()


class HalfBatch(FreezeCacheTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, {name: value[:2] for name, value in inputs.items()}, *args, **kwargs)


SILENTLY_WRONG = [Mirrored, DeepSupervision, Distilling, AugmentsOnDevice, TouchesImages, OwnStep, HalfBatch]


def train(trainer_class, path, config, model=None, callbacks=None, **settings):
    trainer = trainer_class(
        model=settle(tiny_vit()) if model is None else model,
        args=make_args(path, **settings),
        train_dataset=pixel_dataset(),
        freeze_cache=config,
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("trainer_class", SILENTLY_WRONG)
def test_a_loss_that_needs_images_is_an_error_before_the_first_step(trainer_class, tmp_path):
    model = tiny_vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"{trainer_class.__name__}|_prepare_inputs"):
        train(trainer_class, tmp_path, manual("2:2"), model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not list(tmp_path.glob("_freeze_cache/*"))


@pytest.mark.parametrize("trainer_class", SILENTLY_WRONG)
def test_under_the_defaults_it_trains_on_images_as_without_a_cache(trainer_class, tmp_path, caplog):
    never = train(trainer_class, tmp_path / "never", FreezeCacheConfig(cache="never"), num_train_epochs=3)
    default = train(trainer_class, tmp_path / "default", None, num_train_epochs=3)
    assert all(torch.equal(value, weights(never)[name]) for name, value in weights(default).items())
    assert default.freeze_status().cut and not default.freeze_status().replaying
    assert "training goes on from samples" in caplog.text
    assert trainer_class.__name__ in caplog.text or "_prepare_inputs" in caplog.text


class PartOfTheModel(FreezeCacheTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model.classifier(model.vit(inputs["pixel_values"]).last_hidden_state[:, 0])
        loss = F.cross_entropy(logits, inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss


class TwoPasses(FreezeCacheTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        first, second = model(**inputs), model(**inputs)
        loss = first.loss + F.mse_loss(first.logits, second.logits)
        return (loss, first) if return_outputs else loss


@pytest.mark.parametrize("trainer_class", [PartOfTheModel, TwoPasses])
def test_a_loss_that_can_be_replayed_is_replayed_exactly(trainer_class, tmp_path):
    never = train(trainer_class, tmp_path / "never", manual("1:2", cache="never"))
    cached = train(trainer_class, tmp_path / "cached", manual("1:2", codec="fp32"))
    assert cached.freeze_status().replaying
    assert all(torch.equal(value, weights(never)[name]) for name, value in weights(cached).items())


class Notes(TrainerCallback):
    """Notes the state of everything that a rehearsal must leave alone."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        modes = [module.training for module in model.modules()]
        gradients = [p.grad is None or not p.grad.any().item() for p in model.parameters()]
        self.seen.append(
            (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), gradients)
        )
        self.buffers = [buffer.clone() for buffer in model.buffers()]
        del modes


@pytest.mark.parametrize("make_model", [tiny_vit, tiny_resnet])
def test_a_rehearsal_leaves_everything_as_it_was(make_model, tmp_path):
    size = {"tiny_vit": 16, "tiny_resnet": 32}[make_model.__name__]
    notes = []
    for cache in ("never", "always"):
        noted = Notes()
        trainer = FreezeCacheTrainer(
            model=make_model(),
            args=make_args(tmp_path / cache, num_train_epochs=2),
            train_dataset=pixel_dataset(rows=16, size=size),
            freeze_cache=manual("1:2", cache=cache, codec="fp32"),
            callbacks=[noted],
        )
        trainer.train()
        notes.append((noted.seen, noted.buffers))
    (never, never_buffers), (always, always_buffers) = notes
    assert never == always
    assert all(torch.equal(one, other) for one, other in zip(never_buffers, always_buffers, strict=True))


class Late(FreezePolicy):
    """Knows no schedule."""

    def decide(self, moment):
        return 2 if moment.epoch >= 1 else 0


def test_unplanned_cuts_are_rehearsed_when_they_come(tmp_path, caplog):
    from hf_freezecache import FreezePolicy

    class Late(FreezePolicy):
        def decide(self, moment):
            return 2 if moment.epoch >= 1 else 0

    trainer = DeepSupervision(
        model=tiny_vit(),
        args=make_args(tmp_path),
        train_dataset=pixel_dataset(),
        policy=Late(),
        freeze_cache=FreezeCacheConfig(cache="always"),
    )
    trainer.train()
    assert not trainer.freeze_status().replaying and trainer.freeze_status().cut == 2
    assert "training goes on from samples" in caplog.text


def test_a_loss_that_reads_images_now_and_then_gets_them(tmp_path, caplog):
    """No rehearsal sees it: the step that needs samples runs on samples, bit for bit."""

    class NowAndThen(FreezeCacheTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            if self.state.global_step == 9:
                loss = loss + inputs["pixel_values"].mean() + outputs.logits.sum()
            return (loss, outputs) if return_outputs else loss

    never = train(NowAndThen, tmp_path / "never", manual("1:2", cache="never"))
    cached = train(NowAndThen, tmp_path / "cached", manual("1:2", codec="fp32"))
    assert all(torch.equal(value, weights(never)[name]) for name, value in weights(cached).items())
    assert "'pixel_values' is read" in caplog.text
    modes = [(phase.mode, phase.steps) for phase in cached.freeze_cache_report().phases if phase.mode != "build"]
    assert modes == [("live", 4), ("replay", 5), ("live", 7)]
    assert session_of(cached).keeper.mismatch is not None


def test_what_a_step_deviates_by_from_itself_is_accepted_some_times_over():
    """Gradients that cancel out are as large as the noise of kernels that differ from run to run."""
    whole, again, replayed = outcome(weight=1e-7), outcome(weight=2e-7), outcome(weight=-3e-7)
    assert find_difference(whole, replayed, tolerance=1e-2) is not None
    assert find_difference(whole, replayed, tolerance=1e-2, again=again) is None
    assert "by up to" in find_difference(whole, outcome(weight=2e-6), tolerance=1e-2, again=again)
