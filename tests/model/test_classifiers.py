"""Bare classifiers of timm and torchvision become `Trainer` models."""

from __future__ import annotations

import pytest
import timm.data
import timm.loss
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer

import hf_freezecache
from hf_freezecache import wrap_classifier
from tests.support.helpers import (
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
from tests.support.model_zoo import ENTRIES
from tests.support.zoo import TIMM_BLOCKS, ConvNet, timm_vit


def pixels(rows: int = 3, size: int = 16) -> torch.Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(0))


class Answer(nn.Module):
    """Answers with what a function makes of its logits."""

    def __init__(self, change):
        super().__init__()
        self.net, self.change = ConvNet(), change

    def forward(self, x):
        return self.change(self.net(x))


def test_logits_are_the_modules_own_and_the_loss_is_cross_entropy():
    bare = ConvNet().eval()
    labels = torch.tensor([0, 4, 2])
    outputs = wrap_classifier(bare)(pixel_values=pixels(), labels=labels)
    assert torch.equal(outputs.logits, bare(pixels()))
    assert torch.equal(outputs.loss, nn.functional.cross_entropy(bare(pixels()), labels))


def test_no_labels_give_no_loss():
    outputs = wrap_classifier(ConvNet())(pixels())
    assert outputs.loss is None
    assert list(outputs.keys()) == ["logits"]


def test_soft_labels_of_timms_mixup_give_timms_loss():
    mixup = timm.data.Mixup(mixup_alpha=1.0, num_classes=CLASSES)
    images, labels = mixup(pixels(4), torch.tensor([0, 1, 2, 3]))
    bare = ConvNet().eval()
    loss = wrap_classifier(bare)(images, labels).loss
    torch.testing.assert_close(loss, timm.loss.SoftTargetCrossEntropy()(bare(images), labels))


def test_a_loss_that_is_passed_is_used():
    bare, labels = ConvNet().eval(), torch.tensor([0, 4, 2])
    loss = wrap_classifier(bare, loss=timm.loss.BinaryCrossEntropy(smoothing=0.0))(pixels(), labels).loss
    wanted = nn.functional.binary_cross_entropy_with_logits(bare(pixels()), nn.functional.one_hot(labels, 5).float())
    torch.testing.assert_close(loss, wanted)


def test_integer_labels_of_any_width_are_classes():
    model = wrap_classifier(ConvNet().eval())
    labels = torch.tensor([0, 4, 2])
    assert torch.equal(model(pixels(), labels.to(torch.uint8)).loss, model(pixels(), labels).loss)


@pytest.mark.parametrize("labels", [torch.zeros(3, 1, dtype=torch.long), torch.zeros(3), torch.zeros(3, 4)])
def test_labels_of_another_shape_are_refused(labels):
    with pytest.raises(ValueError, match="takes integer classes \\(3,\\) or float probabilities \\(3, 5\\)"):
        wrap_classifier(ConvNet())(pixels(), labels)


@pytest.mark.parametrize("make", [timm_vit, ConvNet])
def test_plain_trainer_trains_saves_and_loads(make, tmp_path):
    model = wrap_classifier(make())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = Trainer(
        model=model,
        args=make_args(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, eval_strategy="epoch"),
        train_dataset=pixel_dataset(),
        eval_dataset=pixel_dataset(8),
    )
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert "eval_loss" in trainer.evaluate()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert saved.keys() == model.state_dict().keys() == {f"model.{name}" for name in model.model.state_dict()}
    resumed = wrap_classifier(make())
    again = Trainer(model=resumed, args=make_args(tmp_path, max_steps=2), train_dataset=pixel_dataset())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(resumed.state_dict()[name], value) for name, value in model.state_dict().items())


def test_cached_training_equals_the_frozen_one_without_cache(tmp_path):
    trainings = {}
    for cache in ("always", "never"):
        torch.manual_seed(0)
        model = wrap_classifier(timm_vit(proj_drop_rate=0.1).train())
        config = manual("1:3", cache=cache, codec="fp32", blocks=[f"model.{name}" for name in TIMM_BLOCKS])
        trainings[cache] = run(model, pixel_dataset(), tmp_path / cache, config, num_train_epochs=3)
    cached, frozen = trainings["always"], trainings["never"]
    assert cached.freeze_cache_report().phases[-1].mode == "replay"
    assert losses(cached) == losses(frozen)
    assert_same_weights(weights(cached), weights(frozen))


def test_the_bare_modules_weights_load_into_the_bare_module():
    wrapper = wrap_classifier(timm_vit())
    assert timm_vit().load_state_dict(wrapper.model.state_dict(), strict=True)


@pytest.mark.parametrize("make", [tiny_vit, lambda: tiny_vit().vit, lambda: wrap_classifier(ConvNet())])
def test_a_model_with_this_interface_is_refused(make):
    with pytest.raises(ValueError, match="itself: if it computes the loss, pass it to the trainer as it is"):
        wrap_classifier(make())


@pytest.mark.parametrize("wrong", [{"model": "resnet18"}, {"model": ConvNet(), "loss": "bce"}])
def test_what_is_no_module_is_refused(wrong):
    with pytest.raises(TypeError, match="must be a torch.nn.Module, not str"):
        wrap_classifier(**wrong)


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (torchvision.models.googlenet, 96),
        # Its auxiliary head needs large images.
        pytest.param(torchvision.models.inception_v3, 299, marks=pytest.mark.slow),
    ],
)
def test_auxiliary_heads_are_refused_until_they_are_off(make, size):
    bare = make(num_classes=CLASSES, init_weights=False, aux_logits=True)
    model, images, labels = wrap_classifier(bare).train(), pixels(2, size), torch.tensor([0, 1])
    with torch.no_grad():
        with pytest.raises(TypeError, match="aux_logits=False"):
            model(images, labels)
        bare.aux_logits = False
        assert model(images, labels).loss.isfinite()


@pytest.mark.parametrize("change", [lambda logits: (logits,), lambda logits: {"logits": logits}])
def test_tuples_and_dicts_of_logits_are_refused(change):
    with pytest.raises(TypeError, match="instead of one tensor of logits"):
        wrap_classifier(Answer(change))(pixels())


def test_answers_that_are_no_logits_of_rows_are_refused():
    with pytest.raises(ValueError, match=r"answers with shape \(3, 5, 1, 1\) for 3 images"):
        wrap_classifier(Answer(lambda logits: logits[:, :, None, None]))(pixels())


@pytest.mark.parametrize("name", ["timm/levit_distilled", "timm/crossvit", "torchvision/squeezenet"])
def test_num_classes_is_the_width_of_the_head(name):
    assert ENTRIES[name].make().num_classes == CLASSES


def test_num_classes_follows_a_new_head():
    bare = torchvision.models.VisionTransformer(16, 4, 1, 2, 8, 16, num_classes=1000)
    bare.heads.head = nn.Linear(8, 7)
    assert wrap_classifier(bare).num_classes == 7


def test_num_classes_of_a_module_without_layers_is_unknown():
    assert wrap_classifier(nn.Flatten()).num_classes is None


def test_timms_description_is_found_where_timm_looks_for_it():
    wrapper = wrap_classifier(timm.create_model("test_resnet", num_classes=CLASSES))
    assert timm.data.resolve_model_data_config(wrapper)["input_size"] == (3, 160, 160)
    assert not hasattr(wrap_classifier(ConvNet()), "pretrained_cfg")


def test_wrap_classifier_is_exported():
    assert hf_freezecache.wrap_classifier is wrap_classifier
    assert "wrap_classifier" in hf_freezecache.__all__


def test_activation_checkpointing_is_timms_own_and_knows_no_other():
    model = wrap_classifier(timm_vit())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.model.grad_checkpointing and model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.model.grad_checkpointing and not model.is_gradient_checkpointing
    for settings in ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, {"every_n_layers": 2}):
        with pytest.raises(ValueError, match="checkpointed as timm does it, which does not know"):
            model.activation_checkpointing_enable(**settings)
    with pytest.raises(ValueError, match="ConvNet has no `set_grad_checkpointing`"):
        wrap_classifier(ConvNet()).activation_checkpointing_enable()
