"""Centered kernel alignment, against other implementations and closed forms."""

import time

import numpy as np
import pytest
import torch
from cka.hsic import hsic

from hf_freezecache.policies.cka import MinibatchCKA, cka, gram, unbiased_hsic


def features(rows=32, width=10, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def by_covariance(x, y):
    """The closed form over features: |Y'X|^2 / (|X'X| |Y'Y|), of centered columns."""
    x, y = (array - array.mean(0) for array in (x.double().numpy(), y.double().numpy()))
    return np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


def test_cka_is_that_of_the_closed_form_over_covariances():
    x, y = features(width=10), features(width=7, seed=1)
    mixed = x @ features(10, 7, seed=2) + 0.3 * y
    for one, other in ((x, y), (x, mixed), (y, mixed)):
        assert cka(gram(one), gram(other)) == pytest.approx(by_covariance(one, other), abs=1e-6)


def test_rotation_factor_and_offset_change_nothing_and_noise_does():
    x = features()
    rotation = torch.linalg.qr(features(10, 10, seed=3)).Q
    assert cka(gram(x), gram(100 + 3 * x @ rotation)) == pytest.approx(1.0, abs=1e-5)
    assert cka(gram(x), gram(x + features(seed=4))) < 0.9
    assert np.isnan(cka(gram(x), gram(torch.ones(32, 4))))


def test_maps_and_tokens_are_flattened():
    maps = features(8, 3 * 4 * 4).reshape(8, 3, 4, 4)
    assert torch.equal(gram(maps), gram(maps.flatten(1)))


def test_small_differences_beside_a_large_mean_are_seen():
    x, y = features(), features(seed=1)
    assert cka(gram(x + 1000), gram(y - 1000)) == pytest.approx(by_covariance(x, y), abs=1e-3)


def test_unbiased_criterion_is_zero_on_average_where_nothing_is_shared():
    drawn = [(gram(features(8, 3, 2 * seed)), gram(features(8, 3, 2 * seed + 1))) for seed in range(1000)]
    values = torch.stack([unbiased_hsic(one, other) for one, other in drawn])
    assert values.mean().abs() < 3 * values.std() / len(values) ** 0.5
    biased = sum(cka(one, other) for one, other in drawn) / len(drawn)
    assert biased > 0.3  # of so few samples; that is what the estimator corrects


def test_unbiased_criterion_is_that_of_the_sums_over_different_samples():
    """U-statistics over all pairs, triples and quadruples of samples that differ (Song et al. 2012, theorem 2)."""
    from itertools import permutations

    k, l = gram(features(6, 3)).double().numpy(), gram(features(6, 2, 1)).double().numpy()  # noqa: E741
    pairs = np.mean([k[i, j] * l[i, j] for i, j in permutations(range(6), 2)])
    triples = np.mean([k[i, j] * l[i, q] for i, j, q in permutations(range(6), 3)])
    quadruples = np.mean([k[i, j] * l[q, r] for i, j, q, r in permutations(range(6), 4)])
    expected = pairs - 2 * triples + quadruples
    found = unbiased_hsic(torch.from_numpy(k), torch.from_numpy(l))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_minibatches_estimate_what_all_samples_have():
    x = features(4096, 10)
    y = x @ features(10, 10, seed=2) + features(4096, 10, seed=3)
    whole, estimates = by_covariance(x, y), {}
    for size in (8, 64):
        batches = MinibatchCKA()
        for one, other in zip(x.split(size), y.split(size), strict=True):
            batches.update(one, other)
        estimates[size] = batches.compute()
    assert estimates == pytest.approx({8: whole, 64: whole}, abs=0.02)
    biased = np.mean([by_covariance(a, b) for a, b in zip(x.split(8), y.split(8), strict=True)])
    assert biased > whole + 0.1


def test_too_small_a_batch_is_refused():
    with pytest.raises(ValueError, match="at least 4 samples.*got 3"):
        unbiased_hsic(torch.eye(3), torch.eye(3))


def test_estimates_are_those_of_pytorch_cka():
    one, other = gram(features(16)), gram(features(16, 5, 1) + features(16, 5))
    expected = [float(value) for value in hsic(one[None], other[None])]
    found = [float(unbiased_hsic(*pair)) for pair in ((one, other), (one, one), (other, other))]
    assert found == pytest.approx(expected, rel=1e-4)


def test_twelve_layers_of_512_samples_are_cheap():
    """64 tokens of 192 channels: two to three seconds of one core."""
    layers = [torch.randn(512, 64 * 192) for _ in range(12)]
    start = time.process_time()
    grams = [gram(layer) for layer in layers]
    assert all(0 <= cka(one, grams[0]) <= 1.0001 for one in grams)
    assert time.process_time() - start < 10
