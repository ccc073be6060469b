"""Layouts and features of every kind, for the tests of codecs, and the error of a codec on them."""

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from hf_freezecache.cache.codec import CODEC_NAMES
from hf_freezecache.model.layout import FeatureLayout

NEEDS_ZFP = pytest.mark.skipif(importlib.util.find_spec("zfpy") is None, reason="zfpy is not installed")
NAMES = [pytest.param(name, marks=NEEDS_ZFP if name == "zfp" else ()) for name in CODEC_NAMES]
QUANTIZED = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@st.composite
def layouts(draw, dtypes=DTYPES):
    kind = draw(st.sampled_from(["tokens", "map", "vector"]))
    size = st.integers(1, 7)
    special, grid = 0, None
    if kind == "tokens":
        special = draw(st.integers(0, 3))
        shape = (special + draw(size), draw(size))
    elif kind == "map":
        shape = (draw(size), draw(size), draw(size))
        grid = shape[1:]
    else:
        shape = (draw(st.integers(1, 40)),)
    return FeatureLayout(shape, grid, special, draw(st.sampled_from(dtypes)))


@st.composite
def features(draw, dtypes=DTYPES, batch=(1, 9)):
    """A layout and a batch of it: Gaussian, heavy-tailed, shifted and constant channels."""
    layout = draw(layouts(dtypes))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = draw(st.integers(*batch))
    kind = draw(st.sampled_from(["gaussian", "heavy", "shifted", "constant"]))
    values = generator.standard_normal((rows, *layout.shape))
    if kind == "heavy":
        values = np.clip(generator.standard_t(1.5, values.shape), -3e4, 3e4)
    elif kind == "shifted":
        values = values * 10.0 ** draw(st.integers(-3, 2)) + 5.0
    elif kind == "constant":
        moved = np.moveaxis(values, layout.channel_dim + 1, 0)
        moved[::2] = np.float32(draw(st.floats(-1e4, 1e4, width=32)))
    return layout, torch.from_numpy(values).to(layout.dtype)


def layout_of(shape, special=0, dtype=torch.float32):
    return FeatureLayout(shape, None, special, dtype)


def per_channel(layout, tensor):
    return tensor.view(-1, 1, 1) if len(layout.shape) == 3 else tensor


def body(layout, batch):
    return batch[:, layout.special_tokens :] if layout.special_tokens else batch


def same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype
        assert torch.equal(one[key], other[key]), key


MAP = FeatureLayout((6, 8, 8), (8, 8), 0, torch.float32)
TOKENS = FeatureLayout((65, 6), (8, 8), 1, torch.float32)


def smooth(layout, rows=12, seed=0):
    """Maps whose neighbours are alike and whose channels differ in size."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(rows, layout.channels, 4, 4, generator=generator)
    maps = torch.nn.functional.interpolate(coarse, layout.grid, mode="bilinear")
    maps = maps + 0.1 * torch.randn(maps.shape, generator=generator)
    maps = maps * torch.logspace(-1, 1, layout.channels)[:, None, None]
    if len(layout.shape) == 3:
        return maps
    tokens = maps.flatten(2).transpose(1, 2)
    special = torch.randn(rows, layout.special_tokens, layout.channels, generator=generator)
    return torch.cat([special, tokens], dim=1)


def error(codec, x):
    """Squared error of every channel."""
    back = codec.decode(codec.encode(x))
    difference = body(codec.layout, back).double() - body(codec.layout, x).double()
    return difference.square().movedim(codec.layout.channel_dim + 1, 0).flatten(1).mean(1)
