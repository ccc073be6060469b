"""Bands of neighbouring positions."""

import pytest
import torch
from support.codec_cases import MAP, TOKENS, smooth

from hf_freezecache.cache.codec.haar import from_bands, to_bands


@pytest.mark.parametrize("layout", [MAP, TOKENS])
def test_bands_hold_the_energy_and_come_back(layout):
    x = smooth(layout)
    bands = to_bands(layout.body(x), layout)
    assert bands.shape == (12, 4, 6, 16)
    torch.testing.assert_close(bands.square().sum(), layout.body(x).square().sum())
    assert bands[:, 0].square().sum() > 0.8 * bands.square().sum()
    out = torch.empty(12, 64 * 6)
    halved = bands / 2 if len(layout.shape) == 3 else (bands / 2).transpose(2, 3).contiguous()
    from_bands(halved, layout, out)
    torch.testing.assert_close(out, layout.body(x).reshape(12, -1), atol=1e-5, rtol=1e-5)
