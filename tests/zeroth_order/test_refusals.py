"""What does not go with zeroth-order training is refused in words, before the first step."""

from __future__ import annotations

import pytest
import torch
from support.helpers import assert_same_weights, make_args, manual, messages, pixel_dataset, tiny_vit
from support.zero_order import PlainZeroOrder, train
from transformers import HfArgumentParser, Trainer, TrainingArguments

from hf_freezecache import FreezeCacheConfig, ZeroOrderConfig, ZeroOrderMixin, ZeroOrderTrainer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "sgd"}, "leave out optim="),
        ({"neftune_noise_alpha": 5.0}, "leave out neftune_noise_alpha"),
        ({"config": manual("1:2", layer_decay=0.5)}, "learning rates of blocks"),
        ({"config": FreezeCacheConfig(policy="auto")}, "tries freezing"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, ZeroOrderTrainer, **{"config": manual("1:2"), **settings})


def test_other_optimizers_are_refused(tmp_path):
    model = tiny_vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match="its own optimizer"):
        train(tmp_path, model=model, optimizers=(optimizer, None))


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("distributed_type", "DEEPSPEED", "DEEPSPEED"),
        ("distributed_type", "FSDP", "FSDP"),
        ("scaler", 1, "GradScaler"),
    ],
)
def test_accelerators_that_do_not_go_with_it_are_refused(attribute, value, message, tmp_path, monkeypatch):
    trainer = PlainZeroOrder(model=tiny_vit(), args=make_args(tmp_path), train_dataset=pixel_dataset(rows=8))
    owner = trainer.accelerator if attribute == "scaler" else type(trainer.accelerator)  # the others are properties
    monkeypatch.setattr(owner, attribute, value)
    with pytest.raises(ValueError, match=message):
        trainer.create_optimizer()


def test_step_that_does_not_come_to_trainers_is_refused(tmp_path):
    class Steps(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            return model(**inputs).loss.detach()

    class Mixed(ZeroOrderMixin, Steps):
        pass

    with pytest.raises(ValueError, match="does not go with this trainer"):
        train(tmp_path, Mixed)


class AddsAfterwards(Trainer):
    """A penalty of the weights beside the loss, as a step of one's own may have it."""

    def penalty(self, model):
        return 0.1 * sum(parameter.square().sum() for parameter in model.parameters())

    def training_step(self, model, inputs, *args, **kwargs):
        loss = self.compute_loss(model, inputs) + self.penalty(model)
        self.accelerator.backward(loss)
        return loss.detach()


class AddsValues(AddsAfterwards):
    """The same by values alone, as a term of outputs is."""

    def penalty(self, model):
        return super().penalty(model).detach()


def assert_close(model, other):
    """But for what subtracting what was added leaves."""
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize("steps", [AddsAfterwards, AddsValues])
def test_step_that_adds_to_the_loss_is_refused(steps, tmp_path):
    class Mixed(ZeroOrderMixin, steps):
        pass

    model = tiny_vit()
    with pytest.raises(ValueError, match="Do it in `compute_loss`"):
        train(tmp_path, Mixed, model=model)
    assert_close(model, tiny_vit())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_of_16_bits_is_refused(dtype, tmp_path):
    """Of losses of about 1.6, two neighbours are 2**-10 or 2**-7 apart: the slope would be noise."""
    model = tiny_vit().to(dtype)
    with pytest.raises(ValueError, match="compute_loss_func"):
        train(tmp_path, model=model)
    assert_same_weights(dict(model.named_parameters()), dict(tiny_vit().to(dtype).named_parameters()))


class MeansOf16Bits(PlainZeroOrder):
    """A loss of 32 bits beside a term of 16."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(pixel_values=inputs["pixel_values"]).logits
        return torch.nn.functional.cross_entropy(logits.float(), inputs["labels"]) + 0.01 * logits.square().mean()


def test_part_of_16_bits_is_warned_about(tmp_path, caplog):
    train(tmp_path, MeansOf16Bits, model=tiny_vit().to(torch.bfloat16), max_steps=2)
    assert messages(caplog).count("a number of 16 bits is made of many") == 1


def test_model_of_an_initialization_is_warned_about(tmp_path, caplog):
    train(tmp_path, max_steps=1)
    assert "those of an initialization" in messages(caplog)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "three_point"}, "two_point, one_sided"),
        ({"estimator": "one_sided"}, "2 at least"),
        ({"estimates": 0}, "1 at least"),
        ({"eps": 0.0}, "larger than 0"),
        ({"number_reuse": "pool", "distribution": "gaussian"}, "uniform numbers"),
        ({"number_bits": 3}, "4 to 16 bits"),
        ({"number_reuse": "pool", "pool_size": 1}, "2 at least"),
        ({"number_reuse": "on_the_fly", "registers": 16, "number_bits": 4}, "from 1 to 15"),
        ({"restore_weights": "never"}, "auto, subtract, copy"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ZeroOrderConfig(**settings)


def test_settings_are_parsed_beside_the_others(tmp_path):
    parser = HfArgumentParser((TrainingArguments, FreezeCacheConfig, ZeroOrderConfig))
    *_, config = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--number_reuse", "pool", "--pool_size", "1023", "--estimates", "2"]
    )
    assert config == ZeroOrderConfig(number_reuse="pool", pool_size=1023, estimates=2)
