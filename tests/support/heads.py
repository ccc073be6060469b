"""Tiny bases in folders, and models of them whose parts behind a cut were changed as a training does."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import nn

from hf_freezecache import BlockChain
from support import zoo
from support.texts import tiny_bert, tiny_llama


def timm_wrapper() -> nn.Module:
    """timm's smallest ViT in Transformers' wrapper."""
    config = tf.TimmWrapperConfig(architecture="test_vit", num_labels=zoo.CLASSES)
    return tf.TimmWrapperForImageClassification(config)


def timm_resnet() -> nn.Module:
    config = tf.TimmWrapperConfig(architecture="test_resnet", num_labels=zoo.CLASSES)
    return tf.TimmWrapperForImageClassification(config)


IMAGE_FAMILIES: dict[str, Callable[[], nn.Module]] = {
    **zoo.FAMILIES,
    "timm_wrapper": timm_wrapper,
    "timm_resnet": timm_resnet,
}
TEXT_FAMILIES = {"bert": tiny_bert, "llama": tiny_llama}
FAMILIES = [*IMAGE_FAMILIES, *TEXT_FAMILIES]


def make_base(family: str, folder: Path) -> Path:
    """Saves a base with numbers that no initialization has."""
    if family in TEXT_FAMILIES:
        return TEXT_FAMILIES[family](folder)
    torch.manual_seed(0)
    model = IMAGE_FAMILIES[family]()
    change(model, named(model), seed=1)
    model.save_pretrained(folder)
    return folder


def load_base(folder: Path, **settings) -> nn.Module:
    """The base's model, as a user loads it."""
    name = tf.AutoConfig.from_pretrained(folder).architectures[0]
    return getattr(tf, name).from_pretrained(folder, **settings).eval()


def probe_of(model: nn.Module, seed: int = 5) -> dict[str, Any]:
    """A batch of inputs."""
    generator = torch.Generator().manual_seed(seed)
    if "input_ids" in inspect.signature(model.forward).parameters:
        tokens = torch.randint(4, model.config.vocab_size, (3, 7), generator=generator)
        mask = torch.ones_like(tokens)
        mask[1, 5:] = 0
        return {"input_ids": tokens, "attention_mask": mask}
    is_timm = "timm" in type(model).__name__.lower() or hasattr(getattr(model, "model", None), "pretrained_cfg")
    size = getattr(getattr(model, "config", None), "image_size", None) or (160 if is_timm else 32)
    pixels = torch.randn(3, 3, size, size, generator=generator)
    return {"pixel_values": pixels.to(next(model.parameters()).dtype)}


def named(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of numbers with a point that are saved with a model."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    saved = model.state_dict()
    return {name: value for name, value in tensors.items() if value.is_floating_point() and name in saved}


def change(model: nn.Module, names: Mapping[str, Any] | list[str], seed: int = 2) -> None:
    """Moves tensors as a training does; variances stay positive."""
    generator = torch.Generator().manual_seed(seed)
    tensors = named(model)
    with torch.no_grad():
        for name in sorted(names):
            value = tensors[name]
            value += 0.05 * torch.rand(value.shape, generator=generator).to(value.dtype)


def behind(model: nn.Module, cut: int, probe: Mapping[str, Any] | None = None) -> list[str]:
    """Names of the tensors behind a cut that a training changes."""
    chain = BlockChain.from_model(model, probe=probe)
    before = chain.prefix_state(cut) if probe is None else (chain.trace(probe), chain.prefix_state(cut))[1]
    return [name for name in named(model) if name not in before]


def trained(folder: Path, cut: int, **settings) -> nn.Module:
    """The base's model with everything behind a cut changed."""
    model = load_base(folder, **settings)
    change(model, behind(model, cut, probe_of(model)))
    return model


def logits(model: nn.Module, seed: int = 5) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**probe_of(model, seed)).logits
