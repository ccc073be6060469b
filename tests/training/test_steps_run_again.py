"""A step that reads the images after its backward pass: gradients count once, or the training stops in words."""

import pytest
import torch
from support.helpers import assert_same_weights, losses, make_args, manual, pixel_dataset, tiny_vit, weights
from transformers import Trainer

from hf_freezecache import FreezeCacheMixin
from hf_freezecache.training.proof import MismatchError


class ReadsLate(Trainer):
    """Looks at the images after the backward pass of one step."""

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.batches = getattr(self, "batches", 0) + 1
        if self.state.global_step == 6 and self.batches % self.args.gradient_accumulation_steps == self.when:
            float(inputs["pixel_values"].mean())
        return loss


class Mixed(FreezeCacheMixin, ReadsLate):
    pass


class Grows(ReadsLate):
    """Gives the model another parameter in that step."""

    def training_step(self, model, inputs, *args, **kwargs):
        if self.state.global_step == 6:
            model.grown = torch.nn.Parameter(torch.zeros(1))
            model.grown.grad = torch.zeros(1)
        return super().training_step(model, inputs, *args, **kwargs)


class MixedGrows(FreezeCacheMixin, Grows):
    pass


def train(path, cache, accumulate=1, when=0, kind=Mixed):
    trainer = kind(
        model=tiny_vit(),
        args=make_args(path, gradient_accumulation_steps=accumulate),
        train_dataset=pixel_dataset(32 * accumulate),
        freeze_cache=manual("1:2", cache=cache, codec="fp32"),
    )
    trainer.when = when
    trainer.train()
    return trainer


@pytest.mark.parametrize(("accumulate", "when"), [(1, 0), (2, 1)])
def test_gradients_of_a_step_that_is_run_again_count_once(accumulate, when, tmp_path):
    frozen, cached = (train(tmp_path / cache, cache, accumulate, when) for cache in ("never", "always"))
    assert not cached.freeze_status().replaying and losses(cached) == losses(frozen)
    assert_same_weights(weights(cached), weights(frozen))


def test_gradients_of_earlier_batches_cannot_be_put_back(tmp_path):
    with pytest.raises(MismatchError, match="it has added to gradients of the batches before it"):
        train(tmp_path, "always", accumulate=2, when=0)


def test_gradients_of_parameters_that_were_added_in_the_epoch_cannot_be_put_back(tmp_path):
    with pytest.raises(MismatchError, match="added since the epoch began"):
        train(tmp_path, "always", kind=MixedGrows)
