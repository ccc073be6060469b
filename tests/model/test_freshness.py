"""What tells the weights of an initialization from trained ones."""

import pytest
import timm
import torch
import torchvision
from support.helpers import tiny_resnet, tiny_vit
from support.pretrained import settle
from support.token_rows import bert, gpt2, llama
from torch import nn

from hf_freezecache.model.freshness import is_fresh, is_untrained


@pytest.mark.parametrize(
    "make",
    [
        tiny_vit,
        tiny_resnet,
        bert,
        gpt2,
        llama,
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8),
        lambda: timm.create_model("resnet10t"),
        lambda: torchvision.models.resnet18(),
        lambda: torchvision.models.VisionTransformer(16, 4, 3, 2, 16, 32),
    ],
)
def test_models_of_an_initialization_are_untrained_and_trained_ones_are_not(make):
    assert is_untrained(make())
    assert not is_untrained(settle(make(), head="none"))


def test_a_model_is_trained_after_a_few_steps():
    model = tiny_vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        model(torch.randn(2, 3, 16, 16), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    assert not is_untrained(model) and not is_fresh(model.classifier)


def zeroed():
    layer = nn.Linear(30, 7)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


@pytest.mark.parametrize(
    "module",
    [zeroed(), nn.Linear(30, 7), nn.Linear(512, 10), nn.Conv2d(8, 4, 1), nn.LayerNorm(8), nn.BatchNorm2d(8)],
    ids=["bias of zeros", "uniform", "wide", "convolution", "norm", "batch norm"],
)
def test_fresh_modules(module):
    assert is_fresh(module)
    with torch.no_grad():
        module.bias += 0.5 * torch.randn(module.bias.shape, generator=torch.Generator().manual_seed(0))
        module.weight *= 1.5
    assert not is_fresh(module)


INITIALIZATIONS = {
    "normal": lambda weight: nn.init.normal_(weight, std=0.02),
    "cut": lambda weight: nn.init.trunc_normal_(weight, std=0.02),
    "Xavier": nn.init.xavier_uniform_,
    "He": nn.init.kaiming_normal_,
    "zeros": nn.init.zeros_,
    "orthogonal": lambda weight: nn.init.orthogonal_(weight, gain=0.5),
}


@pytest.mark.parametrize("shape", [(1, 192), (2, 32), (10, 384), (1000, 768), (4000, 64)])
@pytest.mark.parametrize("initialize", INITIALIZATIONS.values(), ids=INITIALIZATIONS)
def test_heads_with_a_bias_of_zeros_are_fresh_whatever_drew_their_weights(initialize, shape):
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0])
    initialize(layer.weight)
    nn.init.zeros_(layer.bias)
    assert is_fresh(layer)


def test_ten_thousand_drawn_heads_are_all_fresh():
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(24, 3)
    nn.init.zeros_(layer.bias)
    for _ in range(10_000):
        nn.init.normal_(layer.weight, std=0.02, generator=generator)
        assert is_fresh(layer)


def numbers(*shape, draw=torch.randn):
    return draw(*shape, generator=torch.Generator().manual_seed(0))


def directions(rows, alike):
    """Rows of length 1 whose cosines are about `alike`."""
    own, common = numbers(rows + 1, 384).split([rows, 1])
    return nn.functional.normalize((1 - alike) ** 0.5 * own + alike**0.5 * common, dim=1)


GIVEN = {
    "embedded names": directions(10, 0.6),
    "names that are not alike": directions(10, 0.0),
    "with a temperature": 100 * directions(3, 0.0),
    "means of classes": numbers(10, 384, draw=torch.rand),
    "around their mean": directions(10, 0.3) * numbers(10, 1, draw=torch.rand) - directions(10, 0.3).mean(0),
    "of low rank": numbers(20, 3) @ numbers(3, 384) * 0.01,
    "no numbers": torch.full((10, 384), float("nan")).index_fill(1, torch.tensor([0]), 0.1),
    "infinite": numbers(10, 384).index_fill(1, torch.tensor([0]), float("inf")),
    "one output": 3 * directions(1, 0.0) * 384**0.5,
}


@pytest.mark.parametrize("weight", GIVEN.values(), ids=GIVEN)
def test_given_heads_with_a_bias_of_zeros_are_not_fresh(weight):
    layer = nn.Linear(384, len(weight))
    with torch.no_grad():
        layer.weight.copy_(weight)
    nn.init.zeros_(layer.bias)
    assert not is_fresh(layer)


@pytest.mark.parametrize("module", [nn.Linear(30, 7, bias=False), nn.Embedding(5, 3), nn.Dropout(), nn.Sequential()])
def test_where_no_bias_tells_a_module_counts_as_trained(module):
    assert not is_fresh(module)
