"""A few weights of a block, and what is read of them."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_freezecache.smartfrz.history import (
    NUM_FEATURES,
    QUANTILES,
    SAMPLED,
    SCALARS,
    WeightSampler,
    depth_of,
    describe_history,
    snapshot_every,
)


def block(seed=0, scale=1.0):
    torch.manual_seed(seed)
    parameters = {"0.weight": torch.randn(64, 32), "0.bias": torch.randn(64), "1.weight": 10 * torch.randn(8, 4, 3, 3)}
    return {name: nn.Parameter(scale * value) for name, value in parameters.items()}


def scalars(weights, progress, depth=0.5):
    described = describe_history(np.stack(weights), progress, depth)
    return {name: described[:, 3 * QUANTILES + place] for place, name in enumerate(SCALARS)}


def test_fixed_positions_are_the_same_and_fresh_ones_are_not():
    parameters = block()
    sampler = WeightSampler(parameters, 3)
    fixed = [sampler.take(parameters, snapshot, "fixed") for snapshot in range(2)]
    fresh = [sampler.take(parameters, snapshot, "fresh") for snapshot in range(2)]
    assert np.array_equal(fixed[0], fixed[1]) and fixed[0].shape == (SAMPLED,)
    assert not np.array_equal(fresh[0], fresh[1]) and all(np.array_equal(each, np.sort(each)) for each in fresh)
    assert np.array_equal(WeightSampler(parameters, 3).take(parameters, 0, "fixed"), fixed[0])
    assert not np.array_equal(WeightSampler(parameters, 4).take(parameters, 0, "fixed"), fixed[0])


def test_sample_has_the_distribution_of_the_block_in_units_of_each_tensor():
    parameters = block()
    sample = WeightSampler(parameters, 0).take(parameters, 0, "fixed")
    assert np.std(sample) == pytest.approx(1.0, abs=0.1)  # though one tensor is ten times as large
    scaled = block(scale=1e-3)
    assert np.allclose(WeightSampler(scaled, 0).take(scaled, 0, "fixed"), sample, rtol=1e-5)


def test_blocks_with_few_weights_or_none_have_samples_too():
    norm = {"0.weight": nn.Parameter(torch.full((4,), 2.0)), "0.bias": nn.Parameter(torch.zeros(4))}
    assert set(np.unique(WeightSampler(norm, 0).take(norm, 0, "fixed"))) == {0.0, 1.0}
    assert not WeightSampler({}, 0).take({}, 0, "fixed").any()


def test_sampling_draws_nothing_from_the_global_generators_and_keeps_weights():
    parameters = block()
    before, copies = torch.get_rng_state(), {name: value.clone() for name, value in parameters.items()}
    state = np.random.get_state()[1].copy()
    WeightSampler(parameters, 0).take(parameters, 1, "fresh")
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], state)
    assert all(torch.equal(value, copies[name]) for name, value in parameters.items())


def test_drift_and_step_are_told_in_orders_of_magnitude():
    start, way = np.random.default_rng(0).normal(size=(2, SAMPLED)).astype(np.float32)
    small = scalars([start + 1e-3 * gone * way for gone in (0, 1, 2, 3)], [0, 0.1, 0.2, 0.3])
    large = scalars([start + 1e-1 * gone * way for gone in (0, 1, 2, 3)], [0, 0.1, 0.2, 0.3])
    assert large["drift"][1:] - small["drift"][1:] == pytest.approx(np.full(3, 2 / 4), abs=1e-2)
    assert large["turn"][2:] == pytest.approx(np.ones(2), abs=1e-3)  # straight on
    assert large["progress"] == pytest.approx([0, 0.1, 0.2, 0.3]) and set(large["depth"]) == {0.5}
    back = scalars([start, start + way, start], [0, 0.1, 0.2])
    assert back["turn"][2] == pytest.approx(-1, abs=1e-3)
    still = describe_history(np.stack([start, start]), [0, 0.1], 0.0)
    assert np.isfinite(still).all() and still.shape == (2, NUM_FEATURES)


def test_depth_is_0_for_the_stem_and_1_for_the_last_block():
    assert [depth_of(index, 5) for index in range(5)] == [0, 0.25, 0.5, 0.75, 1] and depth_of(0, 1) == 0


def test_trainings_of_any_length_have_as_many_snapshots():
    assert [snapshot_every(steps) for steps in (10, 60, 600, 6007)] == [1, 1, 10, 101]
