"""The two models at their cuts, with features to fit codecs on and others to measure codecs with."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from torchvision.transforms import v2

from hf_freezecache import BlockChain, make_codec
from hf_freezecache.build.fisher import fisher_weights
from hf_freezecache.cache.codec import Codec
from hf_freezecache.model.layout import FeatureLayout

from .._images import FINISH, load_caltech, load_cifar10, load_deit
from .._resnet import block_names, load_resnet

_DEPTH = 56
#: DeiT-Tiny's blocks 3, 6 and 9 of 12; the ends of the three stages of ResNet-56.
CUTS = {"deit": (4, 7, 10), "resnet56": (10, 19, 28)}


@dataclass(frozen=True)
class Case:
    """A model at a cut, with features of images.

    Args:
        model: `deit` or `resnet56`.
        cut: frozen blocks.
        chain: of the model.
        fit: features `(N, *shape)` of training images.
        test: features of other images.
        train: training images, for the Fisher weights.
        options: with `fisher_images`, `batch_size` and `seed`.
    """

    model: str
    cut: int
    chain: BlockChain
    fit: torch.Tensor
    test: torch.Tensor
    train: torch.Tensor
    options: argparse.Namespace

    @property
    def name(self) -> str:
        return f"{self.model} cut {self.cut}"

    @property
    def layout(self) -> FeatureLayout:
        return self.chain.layout(self.cut)

    @cached_property
    def weights(self) -> torch.Tensor:
        """Fisher weights of the features."""
        images = self.train[: self.options.fisher_images].split(self.options.batch_size)
        batches = [{"pixel_values": batch} for batch in images]
        return fisher_weights(self.chain, self.cut, batches, self.options.seed, bands=True)

    @cached_property
    def log_probabilities(self) -> torch.Tensor:
        """What the model answers on the test features, float64 `(M, classes)`."""
        return run_suffix(self.chain, self.test, self.cut, self.options)


def make_cases(options: argparse.Namespace) -> Iterator[Case]:
    """Every model at every cut, one after the other."""
    for name, load in (("deit", _load_deit), ("resnet56", _load_resnet)):
        model, blocks, train, test = load(options)
        chain = BlockChain.from_model(model.eval(), blocks=blocks, probe={"pixel_values": train[:2]})
        for cut in CUTS[name]:
            features = [run_prefix(chain, images, cut, options) for images in (train, test)]
            yield Case(name, cut, chain, *features, train, options)


def fit_codec(name: str, case: Case) -> Codec:
    """A codec fitted on the case's training features."""
    codec = make_codec(name, case.layout)
    return codec.fit(case.fit, weights=case.weights if codec.uses_weights else None)


def run_prefix(chain: BlockChain, images: torch.Tensor, cut: int, options: argparse.Namespace) -> torch.Tensor:
    return torch.cat([chain.prefix({"pixel_values": batch}, cut) for batch in images.split(options.batch_size)])


def run_suffix(chain: BlockChain, features: torch.Tensor, cut: int, options: argparse.Namespace) -> torch.Tensor:
    """Log probabilities, float64 `(N, classes)`."""
    with torch.no_grad(), chain.replay(cut):
        logits = [chain.model(pixel_values=batch)["logits"] for batch in features.split(options.batch_size)]
    return torch.cat(logits).double().log_softmax(dim=1)


def _load_deit(options: argparse.Namespace) -> tuple[nn.Module, None, torch.Tensor, torch.Tensor]:
    counts = {"train": options.fit_images, "test": options.test_images}
    images = [load_caltech(options, split, 224, rows).pixel_values for split, rows in counts.items()]
    return load_deit(options, classes=None), None, *images


def _load_resnet(options: argparse.Namespace) -> tuple[nn.Module, list[str], torch.Tensor, torch.Tensor]:
    transform = v2.Compose([v2.PILToTensor(), *FINISH])
    images = []
    for split, rows in (("train", options.fit_images), ("test", options.cifar_images)):
        dataset = load_cifar10(options, split, rows)
        images.append(torch.stack([transform(image.convert("RGB")) for image in dataset["image"]]))
    return load_resnet(options, _DEPTH), block_names(_DEPTH), *images
