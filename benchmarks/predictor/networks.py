"""The trainings that are recorded for the predictor: networks, data and settings."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms import v2
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    DataCollatorWithPadding,
    RegNetConfig,
    RegNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_freezecache import wrap_classifier

from .._images import CLASSES, FINISH, Pixels, as_batch, load_caltech, load_cifar10, load_deit
from .._resnet import CifarResNet, block_names
from ..text.sources import INTENTS, load_minilm, load_questions, tokenized

#: Samples whose outputs are compared with those of the finished model.
PROBED = 32


@dataclass(frozen=True)
class Run:
    """A training to record.

    Args:
        network: a key of `NETWORKS`.
        seed: of weights, order and augmentation.
        learning_rate: at its largest.
        epochs: of the training.
        schedule: of the learning rate, as `TrainingArguments` names it.
        warmup: share of the steps in which the learning rate rises.
    """

    network: str
    seed: int
    learning_rate: float
    epochs: int
    schedule: str = "linear"
    warmup: float = 0.0

    @property
    def name(self) -> str:
        warmup = "-warmup" if self.warmup else ""
        return f"{self.network}-{self.learning_rate:g}-{self.epochs}-{self.schedule}{warmup}-{self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Network:
    """A kind of training.

    Args:
        data: name of the data.
        is_test: recorded to test a predictor, never to train it.
        make: makes the model, with weights drawn from torch's generator where they are not pretrained.
        blocks: names; None: found.
        rates: learning rates that are recorded.
        epochs: the same, of numbers of epochs.
        batch_size: of the training.
        extra: further model inputs.
    """

    data: str
    is_test: bool
    make: Callable[[argparse.Namespace], nn.Module]
    rates: tuple[float, ...]
    epochs: tuple[int, ...]
    blocks: list[str] | None = None
    batch_size: int = 16
    extra: tuple[str, ...] = ()


def _tiny_vit(options: argparse.Namespace) -> nn.Module:
    config = ViTConfig(
        hidden_size=96,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=192,
        image_size=32,
        patch_size=4,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def _mobilenet(options: argparse.Namespace) -> nn.Module:
    """timm's: that of Transformers takes BatchNorm statistics of nearly the last batch alone (momentum 0.997)."""
    return wrap_classifier(timm.create_model("mobilenetv2_035", num_classes=CLASSES))


def _convnext(options: argparse.Namespace) -> nn.Module:
    config = ConvNextConfig(
        hidden_sizes=[32, 64, 128], depths=[2, 2, 2], num_stages=3, patch_size=4, num_labels=CLASSES
    )
    return ConvNextForImageClassification(config)


def _bert(options: argparse.Namespace) -> nn.Module:
    config = BertConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=2, intermediate_size=256, num_labels=INTENTS
    )
    return BertForSequenceClassification(config)


def _mixer(options: argparse.Namespace) -> nn.Module:
    model = MlpMixer(img_size=32, patch_size=4, num_blocks=6, embed_dim=96, num_classes=10)
    return wrap_classifier(model)


def _regnet(options: argparse.Namespace) -> nn.Module:
    config = RegNetConfig(
        embedding_size=16, hidden_sizes=[24, 48, 96], depths=[1, 2, 2], groups_width=8, num_labels=CLASSES
    )
    return RegNetForImageClassification(config)


NETWORKS = {
    "resnet20": Network("cifar10", False, lambda options: CifarResNet(20), (1e-3, 3e-3), (6, 10), block_names(20)),
    "vit": Network("cifar10", False, _tiny_vit, (5e-4, 1e-3), (6, 10)),
    "deit": Network("caltech101-112", False, load_deit, (5e-5, 2e-4), (4, 6), extra=("interpolate_pos_encoding",)),
    "minilm": Network("banking77", False, lambda options: load_minilm(options)[0], (1e-4, 5e-4), (4, 6)),
    "bert": Network("banking77", False, _bert, (5e-4, 1e-3), (6, 10)),
    "mixer": Network("cifar10", False, _mixer, (5e-4, 1e-3), (6, 10)),
    "regnet": Network("caltech101-64", False, _regnet, (1e-3, 3e-3), (6, 10)),
    "mobilenetv2": Network("caltech101-64", True, _mobilenet, (1e-3,), (8,)),
    "convnext": Network("caltech101-64", True, _convnext, (1e-3,), (8,)),
}


def runs(seeds: int) -> list[Run]:
    """All trainings, in an order in which every network has some as soon as possible.

    Args:
        seeds: of each pair of learning rate and number of epochs.
    """
    planned: list[list[Run]] = []
    for name, network in NETWORKS.items():
        variants = [
            Run(name, seed, rate, epochs, ("linear", "cosine", "constant")[(seed + place) % 3], 0.1 * (seed % 2))
            for seed in range(2 * seeds if network.is_test else seeds)
            for place, (rate, epochs) in enumerate(
                (rate, epochs) for epochs in network.epochs for rate in network.rates
            )
        ]
        planned.append(variants)
    longest = max(map(len, planned))
    return [variants[place] for place in range(longest) for variants in planned if place < len(variants)]


def load_data(options: argparse.Namespace, name: str) -> tuple[Dataset, Callable, int]:
    """Training samples in memory, their collator, and how many there are.

    Args:
        options: of the run.
        name: `data` of a network.
    """
    if name == "cifar10":
        rows = load_cifar10(options, "train", options.rows)
        transform = v2.Compose([v2.PILToTensor(), *FINISH])
        images = torch.stack([transform(image) for image in rows["image"]])
        return Pixels(images, torch.tensor(rows["label"])), flipped_batch, len(rows)
    if name == "banking77":
        _, tokenizer = load_minilm(options)
        rows = load_questions(options, "train").shuffle(seed=0)
        rows = rows.select(range(min(options.rows, len(rows))))
        return tokenized(rows, tokenizer), DataCollatorWithPadding(tokenizer), len(rows)
    data = load_caltech(options, "train", int(name.rpartition("-")[2]), options.rows)
    return data, flipped_batch, len(data)


def flipped_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """Random mirror images of a batch of `Pixels`."""
    pixels = as_batch(batch)["pixel_values"]
    mirrored = torch.rand(len(pixels)) < 0.5
    return {**batch, "pixel_values": torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)}
