"""Tiny classifiers of torchvision, in the wrapper that `Trainer` needs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig
from torchvision.models.regnet import BlockParams
from torchvision.models.resnet import BasicBlock, Bottleneck

from hf_freezecache import wrap_classifier

from .entry import Entry, build
from .inputs import Batch, labelled_pixels
from .transformers_configs import CLASSES


@dataclass(frozen=True)
class _Model:
    make: Callable[..., nn.Module]
    size: int = 64
    settings: dict[str, Any] = field(default_factory=dict)


_SWIN = dict(patch_size=[4, 4], embed_dim=24, depths=[1, 1, 2], num_heads=[1, 2, 4], window_size=[4, 4])
_VIT = dict(image_size=32, patch_size=8, num_layers=4, num_heads=4, hidden_dim=32, mlp_dim=64)
_MAXVIT = dict(
    input_size=(64, 64),
    stem_channels=16,
    block_channels=[16, 32],
    block_layers=[1, 2],
    head_dim=8,
    partition_size=4,
    stochastic_depth_prob=0.1,
)


def _convnext(**settings: Any) -> nn.Module:
    stages = [CNBlockConfig(8, 12, 1), CNBlockConfig(12, 16, 2), CNBlockConfig(16, None, 2)]
    return models.ConvNeXt(stages, **settings)


def _efficientnet(**settings: Any) -> nn.Module:
    blocks = [
        FusedMBConvConfig(1, 3, 1, 8, 8, 1),
        FusedMBConvConfig(2, 3, 2, 8, 16, 2),
        MBConvConfig(2, 3, 2, 16, 24, 2),
    ]
    return models.EfficientNet(blocks, dropout=0.1, last_channel=48, **settings)


def _small_head(channels: int, num_classes: int) -> nn.Module:
    """As the heads of AlexNet and VGG, which have 54 and 120 million parameters."""
    return nn.Sequential(nn.Linear(channels, 32), nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Linear(32, num_classes))


def _alexnet(num_classes: int) -> nn.Module:
    with torch.device("meta"):
        model = models.AlexNet()
    model.features.to_empty(device="cpu")
    for layer in model.features:
        if isinstance(layer, nn.Conv2d):
            layer.reset_parameters()
    model.classifier = _small_head(256 * 6 * 6, num_classes)
    return model


def _vgg(num_classes: int) -> nn.Module:
    with torch.device("meta"):
        model = models.VGG(nn.Identity(), init_weights=False)
    model.features = models.vgg.make_layers([8, "M", 16, "M", 24, 24, "M", 32, "M"], batch_norm=True)
    model.classifier = _small_head(32 * 7 * 7, num_classes)
    return model


def _resnet(**settings: Any) -> nn.Module:
    return models.ResNet(BasicBlock, [1, 1, 1, 1], **settings)


def _resnet_bottleneck(**settings: Any) -> nn.Module:
    return models.ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=8, **settings)


def _regnet(**settings: Any) -> nn.Module:
    stages = BlockParams.from_init_params(depth=6, w_0=16, w_a=8.0, w_m=2.0, group_width=8)
    return models.RegNet(stages, stem_width=8, **settings)


#: Family -> how its tiny model is made.
_MODELS: dict[str, _Model] = {
    "alexnet": _Model(_alexnet),
    "convnext": _Model(_convnext),
    "densenet": _Model(models.DenseNet, settings=dict(growth_rate=8, block_config=(2, 2, 3), num_init_features=16)),
    "efficientnet": _Model(_efficientnet),
    "googlenet": _Model(models.googlenet, settings=dict(aux_logits=False, init_weights=False)),
    "inception_v3": _Model(models.inception_v3, 96, dict(aux_logits=False, init_weights=False)),
    "maxvit": _Model(models.MaxVit, settings=_MAXVIT),
    "mnasnet": _Model(models.MNASNet, settings=dict(alpha=0.25)),
    "mobilenet_v2": _Model(models.mobilenet_v2, settings=dict(width_mult=0.25)),
    "mobilenet_v3": _Model(models.mobilenet_v3_small, settings=dict(width_mult=0.25)),
    "regnet": _Model(_regnet),
    "resnet": _Model(_resnet),
    "resnet_bottleneck": _Model(_resnet_bottleneck),
    "shufflenet": _Model(models.shufflenet_v2_x0_5),
    "squeezenet": _Model(models.squeezenet1_1),
    "swin": _Model(models.SwinTransformer, settings=_SWIN),
    "vgg": _Model(_vgg),
    "vit": _Model(models.VisionTransformer, 32, _VIT),
}


def _make(family: str) -> nn.Module:
    model = _MODELS[family]
    return build(
        lambda: wrap_classifier(model.make(num_classes=CLASSES, **model.settings)), _inputs(family, rows=8, seed=0)
    )


def _inputs(family: str, rows: int = 4, seed: int = 1, padded: bool = True) -> Batch:
    return labelled_pixels(_MODELS[family].size, rows, seed)


def entries() -> list[Entry]:
    """The entries, in alphabetical order."""
    return [
        Entry(
            name=f"torchvision/{family}",
            kind="torchvision",
            family=family,
            make=functools.partial(_make, family),
            inputs=functools.partial(_inputs, family),
        )
        for family in _MODELS
    ]
