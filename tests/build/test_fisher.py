"""Fisher weights: against sums that can be made by hand, and what they leave alone."""

import random

import numpy as np
import pytest
import torch
from support import zoo
from torch import nn

from hf_freezecache import BlockChain
from hf_freezecache.build.fisher import fisher_weights
from hf_freezecache.cache.codec import make_codec
from hf_freezecache.cache.codec.haar import to_bands


class Linear(nn.Module):
    """A feature map that goes through a matrix into logits."""

    def __init__(self, outputs=3, scale=1.0):
        super().__init__()
        self.stem = nn.Conv2d(3, 2, 1)
        self.head = nn.Linear(2 * 16, outputs)
        nn.init.normal_(self.head.weight, std=scale, generator=torch.Generator().manual_seed(1))

    def forward(self, pixel_values):
        return (self.head(self.stem(pixel_values).flatten(1)),)


def images(rows=6, size=4, seed=0):
    return {"pixel_values": torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(seed))}


def linear_chain(**settings):
    torch.manual_seed(0)
    return BlockChain.from_model(Linear(**settings), blocks=["stem"], probe=images())


def exact(chain, batch):
    """Diagonal of `J^T (diag(p) - p p^T) J`, `(B, C, H, W)`."""
    (logits,) = chain.model(**batch)
    p = logits.softmax(1)
    matrix = chain.model.head.weight
    second, first = torch.einsum("bk,kf->bf", p, matrix.square()), p @ matrix
    return (second - first.square()).unflatten(1, (2, 4, 4)).detach()


def test_weights_are_the_mean_squared_gradient_of_the_model_s_own_labels():
    chain = linear_chain()
    found = torch.stack([fisher_weights(chain, 1, [images()], seed=seed) for seed in range(400)]).mean(0)
    assert found.dtype == torch.float32 and found.shape == (2,)
    torch.testing.assert_close(found, exact(chain, images()).mean((0, 2, 3)), rtol=0.05, atol=0)


def test_weights_of_bands_are_those_of_the_transformed_gradient():
    chain = linear_chain(outputs=1)
    draws = [fisher_weights(chain, 1, [images()], seed=seed, bands=True) for seed in range(400)]
    assert draws[0].shape == (4, 2)
    # One answer: the gradient is the matrix itself times normal noise.
    expected = to_bands(chain.model.head.weight.detach().unflatten(1, (2, 4, 4)), chain.layout(1))[0].square().mean(2)
    torch.testing.assert_close(torch.stack(draws).mean(0), expected, rtol=0.1, atol=0)
    one = fisher_weights(chain, 1, [images()], seed=5)
    torch.testing.assert_close(one, draws[5].mean(0))


def test_half_the_weighted_squared_error_is_the_divergence():
    chain = linear_chain(scale=0.3)
    batch, generator = images(rows=64), torch.Generator().manual_seed(3)
    weights = torch.stack([fisher_weights(chain, 1, [batch], seed=seed) for seed in range(20)]).mean(0)
    features = chain.prefix(batch, 1)
    for channel in range(2):
        divergences = []
        for _ in range(20):
            noisy = features.clone()
            noisy[:, channel] += 0.05 * torch.randn(noisy[:, channel].shape, generator=generator)
            with torch.no_grad(), chain.replay(1):
                p, q = (chain.model(f)[0].double().log_softmax(1) for f in (features, noisy))
            divergences.append((p.exp() * (p - q)).sum(1).mean())
        predicted = 0.5 * 16 * float(weights[channel]) * 0.05**2
        assert float(torch.stack(divergences).mean()) == pytest.approx(predicted, rel=0.15)


@pytest.mark.parametrize("name", ["vit", "resnet", "swin"])
def test_every_cut_of_real_models_has_weights(name):
    chain = BlockChain.from_model(zoo.make(name))
    batch = {"pixel_values": zoo.pixels(chain.model)}
    for cut in range(1, len(chain) + 1):
        weights = fisher_weights(chain, cut, [batch, batch], seed=0, bands=True)
        layout = chain.layout(cut)
        assert tuple(weights.shape) in make_codec("mixed", layout).weight_shapes
        assert weights.isfinite().all() and (weights >= 0).all()
        # Behind a ViT's last block, the head reads the CLS token alone.
        assert (weights.sum() == 0) == (name == "vit" and cut == len(chain))


def test_special_tokens_are_left_out():
    """Behind the last block of a ViT only the CLS token reaches the head."""
    chain = BlockChain.from_model(zoo.make("vit"))
    last = len(chain)
    assert chain.layout(last).special_tokens == 1
    assert fisher_weights(chain, last - 1, [images(2, 16)], seed=0).sum() > 0
    assert fisher_weights(chain, last, [images(2, 16)], seed=0).sum() == 0


def test_nothing_of_the_model_or_the_generators_changes():
    chain = BlockChain.from_model(zoo.make("resnet"))
    model = chain.model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = fisher_weights(chain, 2, [images(4, 32)], seed=0)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) and p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.equal(first, fisher_weights(chain, 2, [images(4, 32)], seed=0))
    assert not torch.equal(first, fisher_weights(chain, 2, [images(4, 32)], seed=1))


def test_autocast_and_no_grad_around_are_fine():
    chain = BlockChain.from_model(zoo.make("vit"))
    plain = fisher_weights(chain, 2, [images(4, 16)], seed=0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = fisher_weights(chain, 2, [images(4, 16)], seed=0)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, plain, rtol=0.2, atol=0.02 * float(plain.max()))


def test_no_batches_is_an_error():
    with pytest.raises(ValueError, match="at least one batch"):
        fisher_weights(linear_chain(), 1, [], seed=0)
