"""Adapters of PEFT and quantized weights in models whose blocks are found: right bit for bit, or refused in words."""

from __future__ import annotations

import pytest
import torch
from support.helpers import losses, manual, messages, pixel_dataset, run, tiny_vit
from torch import nn
from transformers import Trainer

from tests.support.found_trainings import assert_cached_equals_frozen, train
from tests.support.model_zoo import ENTRIES

peft = pytest.importorskip("peft")

BERT = ENTRIES["text/bert/BertForSequenceClassification"]
LLAMA = ENTRIES["causal/llama/LlamaForCausalLM"]
EFFICIENTNET = ENTRIES["timm/efficientnet"]
#: Of a model without a task: what is trained beside the adapters.
HEAD = {"modules_to_save": ["classifier"]}


def adapted(config):
    """Wraps a model with adapters of one seed."""

    def change(model: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        return peft.get_peft_model(model, config)

    return change


def lora(*targets, **settings):
    return adapted(peft.LoraConfig(target_modules=list(targets), init_lora_weights=False, **settings))


def adapters(model, name) -> dict[str, bool]:
    """Whether the adapters in a part of a model are trained."""
    return {n: p.requires_grad for n, p in model.named_parameters() if "lora_" in n and name in n}


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.3}, {"use_dora": True}], ids=["lora", "dropout", "dora"])
@pytest.mark.parametrize(
    ("entry", "targets", "head"),
    [(BERT, ["query", "value"], HEAD), (LLAMA, ["q_proj", "v_proj"], {"task_type": "CAUSAL_LM"})],
    ids=["bert", "llama"],
)
def test_adapters_before_and_behind_the_cut_are_right(entry, targets, head, settings, tmp_path):
    cached = assert_cached_equals_frozen(entry, tmp_path, lora(*targets, **head, **settings))
    assert not any(adapters(cached.model, ".0.").values()) and all(adapters(cached.model, ".1.").values())


def test_adapters_behind_the_cut_only_are_right(tmp_path):
    change = lora("query", "value", layers_to_transform=[2, 3], **HEAD)
    cached = assert_cached_equals_frozen(BERT, tmp_path, change)
    assert not adapters(cached.model, ".0.") and all(adapters(cached.model, ".3.").values())


def test_adapters_behind_the_cut_only_of_a_declared_family_are_right(tmp_path):
    change = lora("q_proj", "v_proj", layers_to_transform=[2], **HEAD)
    trained = {
        cache: run(change(tiny_vit()), pixel_dataset(), tmp_path / cache, manual("1:2", cache=cache, codec="fp32"))
        for cache in ("never", "always")
    }
    assert trained["always"].freeze_status().replaying and losses(trained["always"]) == losses(trained["never"])
    assert all(adapters(trained["always"].model, "layers.2.").values())


def test_adapters_of_convolutions_are_right(tmp_path):
    assert_cached_equals_frozen(EFFICIENTNET, tmp_path, lora("conv_pw", **HEAD))


def test_ia3_is_right(tmp_path):
    config = peft.IA3Config(task_type="SEQ_CLS", target_modules=["query", "value"], feedforward_modules=[])
    assert_cached_equals_frozen(BERT, tmp_path, adapted(config))


def test_prompt_tuning_with_a_trained_head_is_right_and_freezes_the_prompt(tmp_path):
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    cached = assert_cached_equals_frozen(BERT, tmp_path, adapted(config))
    trained = {name for name, parameter in cached.model.named_parameters() if parameter.requires_grad}
    assert trained and all("classifier" in name for name in trained)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompts_alone_are_refused_and_train_under_the_defaults(kind, tmp_path, caplog):
    """The prompt enters in front of every block: nothing is left to train behind one that is frozen."""
    change = adapted(getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="nothing is left to train"):
        train(LLAMA, tmp_path / "explicit", manual("1:2"), change)
    ours = train(LLAMA, tmp_path / "ours", None, change)
    plain = train(LLAMA, tmp_path / "plain", None, change, trainer_class=Trainer)
    assert losses(ours) == losses(plain) and ours.freeze_status().cut == 0
    assert "this is plain training" in messages(caplog)


# Quantized weights


def quantized_by_torchao(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(
        model,
        quantization.Int8WeightOnlyConfig(),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and "classifier" not in name,
    )
    return model


def quantized_by_bitsandbytes(layer: str):
    def change(model: nn.Module) -> nn.Module:
        kind = getattr(pytest.importorskip("bitsandbytes").nn, layer)
        settings = {"has_fp16_weights": False} if layer == "Linear8bitLt" else {}
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and "classifier" not in name:
                packed = kind(module.in_features, module.out_features, **settings)
                packed.load_state_dict(module.state_dict())
                model.set_submodule(name, packed)
        return model.to("cpu")  # which packs the weights

    return change


@pytest.mark.parametrize(
    ("change", "weights"),
    [
        (quantized_by_torchao, "Int8Tensor"),
        (quantized_by_bitsandbytes("Linear8bitLt"), "Int8Params"),
        (quantized_by_bitsandbytes("Linear4bit"), "Params4bit"),
    ],
    ids=["torchao int8", "bitsandbytes 8 bits", "bitsandbytes 4 bits"],
)
def test_adapters_on_quantized_weights_are_refused_and_train_under_the_defaults(change, weights, tmp_path, caplog):
    def with_adapters(model):
        return lora("query", "value", **HEAD)(change(model))

    with pytest.raises(ValueError, match=rf"quantized or packed weights \({weights}.*Dequantize"):
        train(BERT, tmp_path / "explicit", manual("1:2"), with_adapters)
    ours = train(BERT, tmp_path / "ours", None, with_adapters)
    plain = train(BERT, tmp_path / "plain", None, with_adapters, trainer_class=Trainer)
    assert losses(ours) == losses(plain) and ours.freeze_status().cut == 0
    assert "this is plain training" in messages(caplog)
