"""Channels of a view as a linear map of warped and kept ones."""

import pytest
import torch
from support.helpers import manual, run, tiny_resnet
from support.images import picture_dataset, replayable

from hf_freezecache.augment.channel_map import ChannelMapFit, apply_channel_map, denormalized
from hf_freezecache.cache.store import FeatureStore

CHANNELS, GRID = 6, (8, 8)
NONE = torch.zeros(0, dtype=torch.int64)
WIDE = torch.tensor([[-1e9], [1e9]]).expand(2, CHANNELS)


def swapped_in_mirrors(rows=64, seed=0, noise=0.05):
    """Views in which mirrored filters come in pairs: channels 0 and 1 answer for each other."""
    generator = torch.Generator().manual_seed(seed)
    warped = torch.randn(rows, CHANNELS, *GRID, generator=generator)
    mirrored = torch.arange(rows) % 2 == 0
    true = torch.where(mirrored[:, None, None, None], warped[:, [1, 0, 2, 3, 4, 5]], warped)
    true = true + noise * torch.randn(true.shape, generator=generator)
    return warped, true, torch.ones(rows, *GRID, dtype=torch.bool), mirrored


def middle(channel):
    """Row of a channel's own position among its nine neighbours."""
    return 9 * channel + 4


def fitted(*parts):
    fit = ChannelMapFit(CHANNELS, GRID)
    for warped, true, shown, mirrored in parts:
        fit.update(warped, true, shown, mirrored)
    return fit


def test_mirrored_pairs_are_found():
    maps = fitted(swapped_in_mirrors(seed=0), swapped_in_mirrors(seed=1)).solve(NONE)
    warped, true, _, mirrored = swapped_in_mirrors(seed=2)
    made = apply_channel_map(maps.float(), warped, None, mirrored, WIDE)
    assert (made - true).square().mean() < 0.01 < 0.3 < (warped - true).square().mean()
    assert maps[1, middle(0), 1] > 0.9 and maps[0, middle(0), 0] > 0.9


def test_channel_that_does_not_gain_is_warped_alone():
    """Pure noise cannot be made of anything: its map stays the channel itself, and none is returned if all are so."""
    warped, _, shown, mirrored = swapped_in_mirrors()
    parts = [
        (warped, torch.randn(warped.shape, generator=torch.Generator().manual_seed(seed)), shown, mirrored)
        for seed in (5, 6)
    ]
    alone = fitted((warped, warped, shown, mirrored), (warped, warped, shown, mirrored))
    assert alone.solve(NONE) is None
    maps = fitted(*parts).solve(NONE)
    # Against noise the mean is nearer than another noise: the map gives nearly nothing.
    assert maps[:, :-1].abs().max() < 0.3


def test_too_few_positions_fit_nothing():
    warped, true, shown, mirrored = swapped_in_mirrors(rows=4)
    assert fitted((warped, true, shown, mirrored), (warped, true, shown, mirrored)).solve(NONE) is None


def test_neighbours_sharpen_what_interpolation_has_blurred():
    parts = []
    for seed in (0, 1, 2):
        warped, _, shown, mirrored = swapped_in_mirrors(seed=seed)
        true = torch.nn.functional.interpolate(warped[:, :, ::2, ::2], size=GRID, mode="bilinear")
        blurred = torch.nn.functional.avg_pool2d(true, 3, 1, 1, count_include_pad=False)
        parts.append((blurred, true, shown, mirrored))
    maps = fitted(*parts[:2]).solve(NONE)
    blurred, true, _, mirrored = parts[2]
    made = apply_channel_map(maps.float(), blurred, None, mirrored, WIDE)
    assert (made - true).square().mean() < 0.4 * (blurred - true).square().mean()


def test_wide_features_and_single_rows_do_without_neighbours():
    assert ChannelMapFit(1000, (7, 7)).side == 1 and ChannelMapFit(8, (1, 7)).side == 1
    assert ChannelMapFit(192, (14, 14)).side == 3


def test_what_is_not_shown_does_not_count():
    clean = [swapped_in_mirrors(seed=seed) for seed in (0, 1)]
    dirty = []
    for warped, true, shown, mirrored in clean:
        shown = shown.clone()
        shown[:, :, :2] = False
        dirty.append((warped, true.masked_fill(~shown[:, None], 1e6), shown, mirrored))
    maps = fitted(*dirty).solve(NONE)
    assert maps.isfinite().all() and maps[1, middle(0), 1] > 0.9


def test_kept_channels_help_and_are_not_made():
    """Channel 2 follows from channel 3 of the view itself, from nothing of the base view."""
    parts = []
    for seed in (0, 1, 2):
        warped, true, shown, mirrored = swapped_in_mirrors(seed=seed)
        own = torch.randn(true[:, 3].shape, generator=torch.Generator().manual_seed(seed + 10))
        true = true.clone()
        true[:, 3], true[:, 2] = own, -2 * own
        parts.append((warped, true, shown, mirrored))
    kept = torch.tensor([3])
    maps = fitted(*parts[:2]).solve(kept)
    warped, true, _, mirrored = parts[2]
    made = apply_channel_map(maps.float(), warped, true[:, kept], mirrored, WIDE)
    assert (made[:, 2] - true[:, 2]).square().mean() < 0.05
    assert maps[:, middle(3), 3].tolist() == [1, 1] and maps[:, :, 3].count_nonzero() == 2


def test_denormalized_map_is_the_map_of_the_features_themselves():
    warped, true, shown, mirrored = swapped_in_mirrors()
    kept = torch.tensor([4])
    mean, deviation = torch.linspace(-3, 3, CHANNELS), torch.linspace(0.1, 5, CHANNELS)
    maps = fitted((warped, true, shown, mirrored), (warped, true, shown, mirrored)).solve(kept)
    normalized = apply_channel_map(maps.float(), warped, true[:, kept], mirrored, WIDE)

    def raw(features, channels=slice(None)):
        return features * deviation[channels, None, None] + mean[channels, None, None]

    own = denormalized(maps, kept, mean, deviation)
    made = apply_channel_map(own, raw(warped), raw(true[:, kept], kept), mirrored, WIDE)
    assert torch.allclose(made, raw(normalized), atol=1e-3)


def test_limits_hold():
    maps = torch.full((2, CHANNELS + 1, CHANNELS), 10.0)
    limits = torch.stack([torch.zeros(CHANNELS), torch.arange(CHANNELS).float()])
    made = apply_channel_map(maps, torch.randn(4, CHANNELS, *GRID), None, torch.tensor([True, False] * 2), limits)
    assert (made >= 0).all() and (made.amax((0, 2, 3)) <= limits[1]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_of_the_features_is_kept(dtype):
    maps = torch.eye(CHANNELS + 1, CHANNELS).expand(2, -1, -1).contiguous()
    warped = torch.randn(3, CHANNELS, *GRID).to(dtype)
    made = apply_channel_map(maps, warped, None, torch.zeros(3, dtype=torch.bool), WIDE)
    assert made.dtype == dtype and torch.allclose(made.float(), warped.float())


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_store_keeps_the_maps_and_trains_from_them(fraction, tmp_path):
    dataset = picture_dataset(64, 32).with_transform(replayable(None, 32))
    settings = dict(num_train_epochs=1, remove_unused_columns=False)
    losses = {}
    for channel_map in (True, False):
        config = manual("0:2", cache="always", sensitive_fraction=fraction, channel_map=channel_map)
        trainer = run(tiny_resnet(), dataset, tmp_path / str(channel_map), config, **settings)
        spec = FeatureStore.open(trainer.freeze_status().store_path).views.spec
        assert (spec.channel_maps is not None) == channel_map
        losses[channel_map] = trainer.state.log_history[0]["loss"]
    assert losses[True] != losses[False]
