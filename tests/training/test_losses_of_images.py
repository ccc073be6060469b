"""Losses that need the images themselves: in a model, and where features have the shape of images."""

import copy

import pytest
import torch
from support.builds import SlowRows
from support.helpers import (
    CLASSES,
    assert_same_weights,
    losses,
    make_args,
    manual,
    pixel_dataset,
    run,
    tiny_vit,
    weights,
)
from support.pretrained import settle
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback, ViTForImageClassification

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer
from hf_freezecache.training.rehearsal import RehearsalError


class ReconstructingViTForImageClassification(ViTForImageClassification):
    """Its loss compares its input with what a decoder makes of the last block."""

    def __init__(self, config):
        super().__init__(config)
        self.decoder = nn.Linear(config.hidden_size, 3 * config.image_size**2)

    def forward(self, pixel_values=None, labels=None):
        token = self.vit(pixel_values=pixel_values).last_hidden_state[:, 0]
        logits = self.classifier(token)
        if labels is None:
            return {"logits": logits}
        reconstruction = F.mse_loss(self.decoder(token), pixel_values.flatten(1))
        return {"loss": F.cross_entropy(logits, labels) + reconstruction, "logits": logits}


class SameShape(nn.Module):
    """Features of three channels, as images have."""

    main_input_name = "pixel_values"

    def __init__(self, seed):
        torch.manual_seed(seed)
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, pixel_values, labels=None):
        logits = self.head(self.first(self.stem(pixel_values)).relu().mean((2, 3)))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Taught(FreezeCacheTrainer):
    teacher = SameShape(9).eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        with torch.no_grad():
            target = self.teacher(**inputs)
        loss = outputs["loss"] + F.mse_loss(outputs["logits"], target["logits"])
        return (loss, outputs) if return_outputs else loss


def reconstructing():
    torch.manual_seed(0)
    return ReconstructingViTForImageClassification(tiny_vit().config), FreezeCacheTrainer, {}


def taught():
    return SameShape(0), Taught, {"blocks": ["stem", "first"]}


@pytest.mark.parametrize("make", [reconstructing, taught])
def test_loss_that_reads_images_never_reads_features(make, tmp_path):
    model, base, settings = make()

    def train(cache):
        trainer = base(
            model=copy.deepcopy(model),
            args=make_args(tmp_path / cache, num_train_epochs=3),
            train_dataset=pixel_dataset(),
            freeze_cache=manual("1:1", cache=cache, codec="fp32", **settings),
        )
        trainer.train()

    with pytest.raises(RehearsalError, match="'pixel_values' is read.*Look at"):
        train("always")
    train("never")


def test_defaults_reconstruct_images(tmp_path):
    model = settle(reconstructing()[0])
    config = {"default": None, "never": FreezeCacheConfig(cache="never")}
    default, never = (run(copy.deepcopy(model), pixel_dataset(), tmp_path / name, one) for name, one in config.items())
    assert default.freeze_status().cut and losses(default) == losses(never)
    assert_same_weights(weights(default), weights(never))


class Diverges(TrainerCallback):
    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))


def test_weights_that_become_nan_are_named_and_end_no_training(tmp_path, caplog, clock):
    for cache, config in {"own": manual("1:2"), "default": None, "never": manual("1:2", cache="never")}.items():
        caplog.clear()
        trainer = run(
            settle(tiny_vit()),
            SlowRows(clock, rows=16),
            tmp_path / cache,
            config,
            num_train_epochs=100,
            callbacks=[Diverges()],
        )
        assert trainer.state.global_step == trainer.state.max_steps
        # The proof of a cut says the one, measuring before it the other.
        is_named = "the weights have diverged" in caplog.text or "is not finite (NaN or inf)" in caplog.text
        assert is_named == (cache != "never")
