"""What people put around a model or into it, where its blocks are found: right bit for bit, or refused in words."""

from __future__ import annotations

import copy
import functools

import pytest
import timm.layers
import torch
import torch.utils.checkpoint
from accelerate import dispatch_model
from support.helpers import losses, make_args, manual, messages, pixel_dataset, run
from torch import nn

from hf_freezecache import FreezeCacheTrainer
from hf_freezecache.model.errors import ChainError
from hf_freezecache.training.preconditions import why_elsewhere
from tests.support.found_trainings import assert_cached_equals_frozen, train
from tests.support.model_zoo import ENTRIES

BERT = ENTRIES["text/bert/BertForSequenceClassification"]
VIT = ENTRIES["timm/vit"]
RESNET = ENTRIES["torchvision/resnet"]
#: A block behind the cut at which these trainings freeze.
LIVE = {BERT: "bert.encoder.layer.1", VIT: "model.blocks.1", RESNET: "model.layer2"}
kinds = pytest.mark.parametrize("entry", [BERT, VIT, RESNET], ids=str)
BACKEND = {"backend": "eager"}


# torch.compile


def compiled(entry, how):
    """The model, or a block of it, compiled."""

    def change(model: nn.Module) -> nn.Module:
        torch._dynamo.reset()
        block = model.get_submodule(LIVE[entry])
        if how == "torch.compile(model)":
            return torch.compile(model, **BACKEND)
        if how == "model.compile()":
            model.compile(**BACKEND)
        elif how == "block.compile()":
            block.compile(**BACKEND)
        elif how == "torch.compile(block)":
            model.set_submodule(LIVE[entry], torch.compile(block, **BACKEND))
        return model

    return change


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("torch.compile(model)", marks=pytest.mark.slow),
        "model.compile()",
        "block.compile()",
        "torch.compile(block)",
        pytest.param("torch_compile=True", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "entry", [VIT, pytest.param(BERT, marks=pytest.mark.slow), pytest.param(RESNET, marks=pytest.mark.slow)], ids=str
)
def test_compiled_model_whose_blocks_are_found_is_right(entry, how, tmp_path, caplog):
    settings = {"torch_compile": True, "torch_compile_backend": "eager"} if how == "torch_compile=True" else {}
    cached = assert_cached_equals_frozen(entry, tmp_path, compiled(entry, how), **settings)
    assert "live epochs run compiled" in messages(caplog)
    assert not any("_orig_mod" in name for name in cached.freeze_status().frozen_blocks)


# Activation checkpointing


def checkpointing(reentrant=False):
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}


@pytest.mark.parametrize("entry", [BERT, VIT, ENTRIES["timm/efficientnet"]], ids=str)
def test_activation_checkpointing_of_found_blocks_changes_nothing(entry, tmp_path):
    cached = assert_cached_equals_frozen(entry, tmp_path, **checkpointing())
    if not any("BatchNorm" in type(module).__name__ for module in cached.model.modules()):
        # These would move their statistics twice in a step.
        without = train(entry, tmp_path / "without", manual("1:2", codec="fp32"))
        assert losses(cached) == losses(without)


def test_reentrant_checkpoints_of_transformers_are_refused(tmp_path):
    with pytest.raises(ChainError, match="'bert' of Bert.*use_reentrant=True"):
        train(BERT, tmp_path, manual("1:2", cache="never"), **checkpointing(reentrant=True))


def test_reentrant_checkpoints_of_timm_are_refused(tmp_path):
    timm.layers.set_reentrant_ckpt(True)
    try:
        with pytest.raises(ChainError, match=r"ImageClassifier checkpoints .*set_reentrant_ckpt\)"):
            train(VIT, tmp_path, manual("1:2"), **checkpointing())
    finally:
        timm.layers.set_reentrant_ckpt(False)


class Checkpointed(nn.Module):
    """Checkpoints its layers itself, when it trains."""

    def __init__(self, reentrant: bool):
        super().__init__()
        self.reentrant = reentrant
        self.stem, self.head = nn.Linear(768, 8), nn.Linear(8, 5)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))

    def forward(self, pixel_values, labels=None):
        x = self.stem(pixel_values.flatten(1))
        for layer in self.layers:
            if self.training:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=self.reentrant)
            else:
                x = layer(x)
        logits = self.head(x)
        return {"loss": None if labels is None else nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("cache", ["always", "never"])
def test_reentrant_checkpoints_of_the_models_own_code_are_refused(cache, tmp_path):
    """What lies in them behind a frozen block would get no gradient: torch warns, and only the head is trained."""
    config = manual("0:2", cache=cache, blocks=["stem", "layers.0", "layers.1"])
    with pytest.raises(ChainError, match="Checkpointed checkpoints activations with use_reentrant=True"):
        run(Checkpointed(reentrant=True), pixel_dataset(), tmp_path, config)


def test_reentrant_checkpoints_under_the_defaults_are_plain_training(tmp_path, caplog):
    torch.manual_seed(0)
    model = Checkpointed(reentrant=True)
    before = copy.deepcopy(model.state_dict())
    ours = run(model, pixel_dataset(), tmp_path, num_train_epochs=2)
    assert ours.freeze_status().cut == 0 and "plain training" in messages(caplog)
    # Its stem has no reentrant checkpoint before it, and the layers get the gradient of a trained stem.
    assert not any(torch.equal(before[name], value) for name, value in model.state_dict().items())
    apply = torch.utils.checkpoint.CheckpointFunction.apply
    assert apply.__self__ is torch.utils.checkpoint.CheckpointFunction  # put back


def test_checkpoints_of_the_models_own_code_are_right(tmp_path):
    trained = {}
    for cache in ("always", "never"):
        torch.manual_seed(0)
        config = manual("0:2", cache=cache, codec="fp32", blocks=["stem", "layers.0", "layers.1"])
        trained[cache] = run(Checkpointed(reentrant=False), pixel_dataset(), tmp_path / cache, config)
    assert trained["always"].freeze_status().replaying and losses(trained["always"]) == losses(trained["never"])


# Kernels and memory


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "name", ["text/bert/BertForSequenceClassification", "causal/llama/LlamaForCausalLM"], ids=["bert", "llama"]
)
def test_attention_implementations_of_found_blocks_are_right(name, implementation, tmp_path):
    def change(model):
        model.set_attn_implementation(implementation)
        return model

    cached = assert_cached_equals_frozen(ENTRIES[name], tmp_path, change)
    assert cached.model.config._attn_implementation == implementation


@pytest.mark.parametrize(
    "name",
    [
        "torchvision/resnet",
        "torchvision/densenet",
        "timm/efficientnet",
        "timm/vit",
        "image/convnextv2/ConvNextV2ForImageClassification",
        "image/resnet/ResNetForImageClassification",
    ],
)
def test_channels_last_is_right(name, tmp_path):
    def change(model):
        return model.to(memory_format=torch.channels_last)

    cached = assert_cached_equals_frozen(ENTRIES[name], tmp_path, change)
    kernels = [parameter for parameter in cached.model.parameters() if parameter.ndim == 4]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


# Devices


@kinds
@pytest.mark.parametrize("by_part", [False, True], ids=["one entry", "one entry for each part"])
def test_model_that_accelerate_has_hooked_is_right(entry, by_part, tmp_path):
    """`device_map` on one device: hooks around the forward of every module."""

    def change(model):
        devices = {name: "cpu" for name, _ in model.named_children()} if by_part else {"": "cpu"}
        return dispatch_model(model, devices, force_hooks=True, main_device="cpu")

    cached = assert_cached_equals_frozen(entry, tmp_path, change)
    assert hasattr(cached.model, "hf_device_map")


@kinds
def test_model_in_data_parallel_is_refused(entry, tmp_path):
    with pytest.raises(ValueError, match=r"a model in DataParallel: pass the module in it \(model.module\)"):
        train(entry, tmp_path, manual("1:2"), nn.DataParallel)


def test_model_on_several_devices_is_refused():
    """There is one device here that holds numbers: the other is one that holds none."""
    model = RESNET.make()
    assert why_elsewhere(model) is None
    model.model.layer4.to("meta")
    assert "meta device, as accelerate leaves offloaded" in why_elsewhere(model)
    devices = [torch.empty(0), torch.empty(0)]
    devices[1] = type("Elsewhere", (), {"device": torch.device("cuda:1")})()
    model.parameters = functools.partial(iter, devices)
    assert "ResNet" not in why_elsewhere(model) and "(cpu, cuda:1; device_map)" in why_elsewhere(model)


def test_several_gpus_in_one_process_freeze_found_blocks_and_do_not_cache(tmp_path, caplog):
    args = make_args(tmp_path, num_train_epochs=2)
    args._n_gpu = 2  # where there is no GPU `DataParallel` runs the module itself
    rows = [{"pixel_values": row, "labels": label} for row, label in zip(*VIT.inputs(rows=16).values(), strict=True)]
    trainer = FreezeCacheTrainer(model=VIT.make(), args=args, train_dataset=rows, freeze_cache=manual("1:2"))
    trainer.train()
    assert isinstance(trainer.model_wrapped, nn.DataParallel)
    assert trainer.freeze_status().cut == 2 and not trainer.freeze_status().replaying
    assert "Several GPUs" in messages(caplog)
