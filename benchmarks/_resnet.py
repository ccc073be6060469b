"""The ResNets for CIFAR-10 (He et al. 2015, arXiv 1512.03385, section 4.2), as plain modules."""

from __future__ import annotations

import argparse

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from ._common import shared_folder

CLASSES = 10
_WIDTHS = (16, 32, 64)
#: Where the published weights have other names.
_RENAMED = {"conv1.": "stem.0.", "bn1.": "stem.1.", "linear.": "head."}


def block_names(depth: int) -> list[str]:
    """The chain of a ResNet with `depth` = 6n + 2 layers, stem first, for `FreezeCacheConfig(blocks=...)`."""
    return ["stem", *(f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(_blocks(depth)))]


def load_resnet(options: argparse.Namespace, depth: int) -> CifarResNet:
    """A ResNet with the weights of akamaster/pytorch_resnet_cifar10; for images of ImageNet's mean and deviation."""
    state = load_file(shared_folder(options, "weights", f"resnet{depth}_cifar10.safetensors"))
    model = CifarResNet(depth)
    renamed = {}
    for name, value in state.items():
        start = next((old for old in _RENAMED if name.startswith(old)), None)
        name = name if start is None else _RENAMED[start] + name[len(start) :]
        renamed[name.replace(".bn", ".norm")] = value
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    if unexpected or not all(name.endswith("num_batches_tracked") for name in missing):
        raise ValueError(f"the weights do not fit: {unexpected} are too many, {missing} are missing")
    return model


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters (option A): every second pixel, zeros for channels.

    Args:
        inputs: channels that come in.
        outputs: channels that go out; where they are more, height and width are halved.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.stride, self.new_channels = (1, 0) if inputs == outputs else (2, outputs - inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=self.stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        maps = _channels_last(maps)
        residual = functional.relu(self.norm1(self.conv1(maps)))
        residual = self.norm2(self.conv2(residual))
        if self.new_channels:
            before = self.new_channels // 2
            maps = maps[:, :, :: self.stride, :: self.stride]
            maps = functional.pad(maps, (0, 0, 0, 0, before, self.new_channels - before))
        return functional.relu(maps + residual)


class CifarResNet(nn.Module):
    """Stem, three stages of n blocks, pooling and a linear head.

    Weights are drawn from torch's generator, as He et al. 2015 (arXiv 1502.01852) do.

    Args:
        depth: 6n + 2 layers; 20 have 272 thousand parameters.
    """

    def __init__(self, depth: int):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, _WIDTHS[0], 3, padding=1, bias=False), nn.BatchNorm2d(_WIDTHS[0]), nn.ReLU()
        )
        inputs = _WIDTHS[0]
        for stage, width in enumerate(_WIDTHS, start=1):
            blocks = [ResidualBlock(inputs if block == 0 else width, width) for block in range(_blocks(depth))]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            inputs = width
        self.head = nn.Linear(inputs, CLASSES)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Logits `(B, 10)` of images `(B, 3, 32, 32)`, and the loss if there are labels `(B,)`."""
        maps = self.stem(_channels_last(pixel_values))
        maps = self.layer3(self.layer2(self.layer1(maps)))
        logits = self.head(maps.mean((2, 3)))
        if labels is None:
            return {"logits": logits}
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def _blocks(depth: int) -> int:
    """Blocks of a stage."""
    return (depth - 2) // 6


def _channels_last(maps: torch.Tensor) -> torch.Tensor:
    # A third faster on a CPU. Replayed features come in the other order: each block sees to its own input.
    return maps.contiguous(memory_format=torch.channels_last)
