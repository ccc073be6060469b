"""Features as maps, and maps in their place."""

import pytest
import torch
from support.feature_maps import map_layout

from hf_freezecache.augment.maps import put_maps, to_maps
from hf_freezecache.model.layout import FeatureLayout


def test_put_maps_replaces_positions_and_leaves_special_tokens():
    layout = FeatureLayout((8, 4), (2, 3), 2, torch.float32)
    features, maps = torch.randn(5, 8, 4), torch.randn(5, 4, 2, 3)
    special = features[:, :2].clone()
    assert put_maps(features, maps, layout) is features
    assert torch.equal(features[:, :2], special)
    assert torch.equal(to_maps(features, layout), maps)
    assert torch.equal(features[1, 2 + 1 * 3 + 2], maps[1, :, 1, 2])


def test_put_maps_works_for_maps_in_any_memory_format():
    layout = map_layout(3, (2, 5))
    features = torch.randn(4, 3, 2, 5).to(memory_format=torch.channels_last)
    maps = torch.randn(4, 3, 2, 5)
    assert torch.equal(put_maps(features, maps, layout), maps)


def test_put_maps_refuses_maps_that_do_not_fit():
    layout = map_layout(3, (2, 5))
    with pytest.raises(ValueError, match="expected maps"):
        put_maps(torch.zeros(4, 3, 2, 5), torch.zeros(1, 3, 2, 5), layout)
