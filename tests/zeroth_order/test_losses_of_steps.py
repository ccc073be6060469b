"""The losses of a step: of the same draws at every place, with enough digits, and numbers at all."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from support.helpers import assert_same_weights, losses, messages, pixel_dataset, tiny_vit, weights
from support.pretrained import settle
from support.zero_order import CONFIGS, COPY, PlainZeroOrder, Seen, train, weights_of

from hf_freezecache.rng import RngState


def test_same_loss_twice_although_the_model_drops_out(tmp_path):
    model = settle(tiny_vit(hidden_dropout_prob=0.5))
    with torch.no_grad():
        model.classifier.weight.mul_(20)  # with dropout, losses of the same weights differ by more than 0.1
    trainer = train(tmp_path, model=model, max_steps=1, learning_rate=0.0, zero_order={"eps": 1e-6, **COPY})
    [entry] = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["zero_order/loss_ahead"] == pytest.approx(entry["zero_order/loss_behind"], abs=1e-3)
    assert trainer.model.training
    drawn = [model(**pixel_dataset(rows=8)[:]).loss.item() for _ in range(4)]
    assert max(drawn) - min(drawn) > 0.1


class DrawsInTheLoss(PlainZeroOrder):
    """A loss that draws random numbers from all generators, in eval mode too: masks, noise, sampled negatives."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        factors = torch.rand(len(inputs["labels"])) * np.random.rand() + random.random()
        logits = model(pixel_values=inputs["pixel_values"]).logits
        return (torch.nn.functional.cross_entropy(logits, inputs["labels"], reduction="none") * factors).mean()


class DrawsOnce(DrawsInTheLoss):
    """The state of the generators after one loss, at every step."""

    def training_step(self, *args, **kwargs):
        before = RngState()
        for draw in (lambda: torch.rand(8), np.random.rand, random.random):
            draw()
        expected = RngState()
        before.restore()
        loss = super().training_step(*args, **kwargs)
        assert expected.is_current()
        return loss


@pytest.mark.parametrize("kind", ["gaussian", "one-sided"])
def test_loss_that_draws_gets_the_same_numbers_at_every_place(kind, tmp_path):
    """Else the difference of two losses would be that of two draws, 1,000 times what the weights make of it."""
    settings = {"estimates": 3, **CONFIGS[kind], "eps": 1e-6, **COPY}
    trainer = train(tmp_path, DrawsOnce, learning_rate=0.0, zero_order=settings, train_dataset=pixel_dataset(rows=24))
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 6
    for entry in entries:
        assert entry["zero_order/loss_ahead"] == pytest.approx(entry["zero_order/loss_behind"], abs=1e-3)


class AutocastsOutside(PlainZeroOrder):
    """Autocast remembers the weights that it has cast until its context ends."""

    def compute_loss_context_manager(self):
        stack = super().compute_loss_context_manager()
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        return stack


@pytest.mark.parametrize("trainer_class", [PlainZeroOrder, AutocastsOutside])
def test_autocast_sees_weights_that_have_moved(trainer_class, tmp_path):
    exact = train(tmp_path / "fp32", zero_order={"eps": 0.05}, max_steps=1)
    cast = train(tmp_path / "bf16", trainer_class, zero_order={"eps": 0.05}, max_steps=1, bf16=True)
    slopes = [trainer.state.log_history[0]["zero_order/projected_gradient"] for trainer in (exact, cast)]
    assert slopes[1] == pytest.approx(slopes[0], rel=0.2) and slopes[1] != slopes[0]


class InSinglePrecision(PlainZeroOrder):
    """The loss of logits of 16 bits, in 32 bits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(pixel_values=inputs["pixel_values"]).logits
        return torch.nn.functional.cross_entropy(logits.float(), inputs["labels"])


def test_half_weights_learn_where_the_loss_has_32_bits(tmp_path):
    model = tiny_vit().to(torch.bfloat16)
    settings = {"eps": 3e-2, "estimates": 4}
    trainer = train(
        tmp_path, InSinglePrecision, model=model, num_train_epochs=25, learning_rate=1e-2, zero_order=settings
    )
    found = losses(trainer)
    assert sum(found[-9:]) < 0.97 * sum(found[:9])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_come_back_bit_for_bit(dtype, tmp_path):
    seen = Seen()
    model = tiny_vit().to(dtype)
    before = weights_of(model)
    trainer = train(tmp_path, InSinglePrecision, model=model, callbacks=[seen], learning_rate=0.0)
    assert len(losses(trainer)) == 6
    assert all(torch.equal(value, before[name]) for found in seen.weights for name, value in found.items())


def test_loss_that_is_no_number_leaves_the_weights(tmp_path, caplog):
    class Broken(PlainZeroOrder):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * float("inf")

    trainer = train(tmp_path, Broken, max_steps=2, zero_order=COPY)
    assert_same_weights(weights(trainer), tiny_vit().state_dict())
    assert "no number" in messages(caplog)


def test_infinite_slopes_of_both_signs_leave_the_weights(tmp_path, caplog):
    """Their sum is no number, either."""

    class Broken(PlainZeroOrder):
        calls = 0

        def compute_loss(self, *args, **kwargs):
            Broken.calls += 1
            factor = [float("inf"), 1.0, 1.0, float("inf")][Broken.calls % 4]
            return super().compute_loss(*args, **kwargs) * factor

    trainer = train(tmp_path, Broken, max_steps=2, zero_order={**COPY, "estimates": 2})
    assert_same_weights(weights(trainer), tiny_vit().state_dict())
    assert "no number" in messages(caplog)
