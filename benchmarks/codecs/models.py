"""The two models at their cuts, and what each codec is given: features to fit on, and others to be measured with."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from datasets import load_dataset
from torch import nn
from torchvision.transforms import v2
from transformers import ViTForImageClassification

from hf_freezecache import BlockChain
from hf_freezecache.build.fisher import fisher_weights
from hf_freezecache.model.layout import FeatureLayout

from .._common import shared_folder
from .._images import WEIGHTS, load_caltech
from .._resnet import block_names, load_resnet

_DEPTH = 56
#: DeiT-Tiny's blocks 3, 6 and 9 of 12; the ends of the three stages of ResNet-56.
CUTS = {"deit": (4, 7, 10), "resnet56": (10, 19, 28)}


@dataclass(frozen=True)
class Case:
    """A model at a cut.

    Args:
        model: `deit` or `resnet56`.
        cut: frozen blocks.
        chain: of the model.
        layout: of the features.
        fit: features `(N, *shape)` of training images.
        weights: Fisher weights, from training images.
        test: features of other images.
        log_probabilities: `(M, classes)` of those, float64.
    """

    model: str
    cut: int
    chain: BlockChain
    layout: FeatureLayout
    fit: torch.Tensor
    weights: torch.Tensor
    test: torch.Tensor
    log_probabilities: torch.Tensor

    @property
    def name(self) -> str:
        return f"{self.model} cut {self.cut}"


def make_cases(options: argparse.Namespace) -> Iterator[Case]:
    """Every model at every cut, one after the other."""
    for name, load in load_models().items():
        model, blocks, train, test = load(options)
        chain = BlockChain.from_model(model.eval(), blocks=blocks, probe={"pixel_values": train[:2]})
        fisher = [{"pixel_values": batch} for batch in train[: options.fisher_images].split(options.batch_size)]
        for cut in CUTS[name]:
            fit, features = run_prefix(chain, train, cut, options), run_prefix(chain, test, cut, options)
            yield Case(
                model=name,
                cut=cut,
                chain=chain,
                layout=chain.layout(cut),
                fit=fit,
                weights=fisher_weights(chain, cut, fisher, options.seed, bands=True),
                test=features,
                log_probabilities=run_suffix(chain, features, cut, options),
            )


def load_models() -> dict[str, Callable]:
    """What loads each model: itself, its blocks if they are not declared, training images and others."""
    return {"deit": _load_deit, "resnet56": _load_resnet}


def run_prefix(chain: BlockChain, images: torch.Tensor, cut: int, options: argparse.Namespace) -> torch.Tensor:
    return torch.cat([chain.prefix({"pixel_values": batch}, cut) for batch in images.split(options.batch_size)])


def run_suffix(chain: BlockChain, features: torch.Tensor, cut: int, options: argparse.Namespace) -> torch.Tensor:
    """Log probabilities, float64 `(N, classes)`."""
    with torch.no_grad(), chain.replay(cut):
        logits = [chain.model(pixel_values=batch)["logits"] for batch in features.split(options.batch_size)]
    return torch.cat(logits).double().log_softmax(dim=1)


def _load_deit(options: argparse.Namespace) -> tuple[nn.Module, None, torch.Tensor, torch.Tensor]:
    folder = shared_folder(options, "weights", WEIGHTS)
    model = ViTForImageClassification.from_pretrained(folder, local_files_only=True)
    counts = {"train": options.fit_images, "test": options.test_images}
    images = [load_caltech(options, split, 224, rows).pixel_values for split, rows in counts.items()]
    return model, None, *images


def _load_resnet(options: argparse.Namespace) -> tuple[nn.Module, list[str], torch.Tensor, torch.Tensor]:
    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    images = []
    for file, rows in (("train-00000-of-00005", options.fit_images), ("test-00000-of-00001", options.cifar_images)):
        path = shared_folder(options, "data", "cifar10", f"{file}.parquet")
        dataset = load_dataset("parquet", data_files=str(path), split="train").select(range(rows))
        images.append(torch.stack([transform(image.convert("RGB")) for image in dataset["image"]]))
    return load_resnet(options, _DEPTH), block_names(_DEPTH), *images
