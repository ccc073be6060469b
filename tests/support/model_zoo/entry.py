"""What the zoo hands out: a tiny model by name, with weights of a seed and batches that fit it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_freezecache.rng import preserve_rng

#: Spread of the noise that replaces or moves constant weights.
_NOISE = 0.1
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class MakeBatch(Protocol):
    def __call__(self, rows: int = 4, seed: int = 1, padded: bool = True) -> dict[str, torch.Tensor]:
        """Makes a batch of model inputs, labels included.

        Args:
            rows: number of rows.
            seed: of the random values.
            padded: whether rows of text and sound have differing lengths and padding at their ends.
        """


@dataclass(frozen=True)
class Entry:
    """A tiny model.

    Args:
        name: unique in the zoo, e.g. `text/bert/BertForSequenceClassification` or `timm/crossvit`.
        kind: `image`, `text`, `audio`, `token`, `question`, `choice`, `causal`, `timm` or `torchvision`.
        family: the model type of Transformers, or the family's name in timm or torchvision.
        make: builds the model in eval mode and fp32; equal at each call.
        inputs: makes a batch, see `MakeBatch`; `labels` are left out for the few models that take none.
    """

    name: str
    kind: str
    family: str
    make: Callable[[], nn.Module]
    inputs: MakeBatch

    def __str__(self) -> str:
        return self.name


def build(make: Callable[[], nn.Module], batch: dict[str, torch.Tensor], seed: int = 0) -> nn.Module:
    """Builds a model whose weights depend on the seed only and have no constant among them.

    The global generators are as before afterwards.

    Args:
        make: builds the model.
        batch: model inputs, which give batch normalisation its running statistics.
        seed: of the weights.

    Returns:
        The model in eval mode.
    """
    with preserve_rng(), _unset_memory_is_nan():
        torch.manual_seed(seed)
        model = make().eval()
        randomize(model, seed)
        _fill_statistics(model, batch, seed)
    return model


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Adds noise to every parameter that starts constant.

    Layer scales of 1e-5, biases of 0, normalisations of 1 and gates of 0 would hide mistakes: what is left out adds
    nothing. Parameters that a model leaves unset become noise. Linear and
    convolutional layers whose weights are so small that a signal fades in a few layers get larger ones.

    Args:
        model: changed in place.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * _NOISE

    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            unset = ~parameter.isfinite()
            if unset.any():
                parameter.copy_(torch.where(unset, noise(parameter), parameter))
            elif (parameter == parameter.flatten()[0]).all():
                parameter.add_(noise(parameter))
        for module in model.modules():
            weight = module._parameters.get("weight")
            if isinstance(module, _LAYERS) and weight is not None and weight.numel() > 1:
                gain = weight.std() * weight[0].numel() ** 0.5
                weight.mul_((1 / gain).clamp(min=1))


def _fill_statistics(model: nn.Module, batch: dict[str, torch.Tensor], seed: int) -> None:
    """Sets running statistics to those of a batch, and moves them a little.

    With fresh statistics a deep network's answers hardly differ between rows.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.train().momentum = 1.0
    with torch.no_grad():
        model(**batch)
        generator = torch.Generator().manual_seed(seed)
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
            noise = torch.randn(2, layer.num_features, generator=generator) * _NOISE
            layer.running_mean.add_(noise[0] * layer.running_var.sqrt())
            layer.running_var.mul_(noise[1].exp())
    # LeViT remembers what it computes from its weights in eval mode, until it is in train mode.
    model.train().eval()


@contextlib.contextmanager
def _unset_memory_is_nan() -> Iterator[None]:
    """Makes `torch.empty` answer NaN: parameters that a model never sets would hold what the memory held."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
