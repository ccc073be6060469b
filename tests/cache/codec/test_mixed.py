"""The codec that gives every channel and band its own number of bits."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.codec_cases import DTYPES, EXAMPLES, MAP, TOKENS, body, error, features, layout_of, same, smooth

from hf_freezecache.cache.codec import check_codec_name, make_codec
from hf_freezecache.cache.codec.haar import to_bands
from hf_freezecache.model.layout import FeatureLayout

RATES = ("mixed@2", "mixed", "mixed@3.7", "mixed@6", "mixed@10")


@pytest.mark.parametrize("layout", [MAP, TOKENS])
@pytest.mark.parametrize("name", RATES)
def test_mixed_spends_its_rate_exactly(layout, name):
    codec = make_codec(name, layout)
    rate = check_codec_name(name)[1]
    assert codec.columns["base"] == (torch.uint8, int(rate * 6) * 64 // 8)
    columns, row_bytes = codec.columns, codec.row_bytes
    codec.fit(smooth(layout))
    assert (codec.columns, codec.row_bytes) == (columns, row_bytes)
    assert int(codec.bits.sum()) == 4 * int(rate * 6)
    assert codec.encode(smooth(layout))["base"].shape[1] == columns["base"][1]


@pytest.mark.parametrize("layout", [MAP, TOKENS])
def test_more_bits_give_a_smaller_error(layout):
    x = smooth(layout)
    errors = [float(error(make_codec(name, layout).fit(x), x).sum()) for name in RATES]
    assert all(more < less / 1.5 for less, more in itertools.pairwise(errors))


@pytest.mark.parametrize("layout", [MAP, TOKENS])
def test_mixed_beats_equal_bits_where_channels_and_neighbours_differ(layout):
    x, new = smooth(layout), smooth(layout, seed=1)
    equal, mixed = (make_codec(name, layout).fit(x) for name in ("int2", "mixed@2"))
    assert error(mixed, new).sum() < error(equal, new).sum() / 3
    assert mixed.row_bytes == equal.row_bytes


@pytest.mark.parametrize("layout", [MAP, TOKENS])
def test_weights_move_bits_and_error(layout):
    x = smooth(layout)
    weights = torch.ones(6)
    weights[1] = 1e4
    plain, weighted = make_codec("mixed", layout).fit(x), make_codec("mixed", layout).fit(x, weights=weights)
    assert weighted.bits[:, 1].sum() > plain.bits[:, 1].sum()
    assert error(weighted, x)[1] < error(plain, x)[1] / 4
    assert (error(weighted, x) * weights).sum() < (error(plain, x) * weights).sum()
    same(make_codec("mixed", layout).fit(x, weights=torch.ones(6)).tensors(), plain.tensors())
    bands = torch.ones(4, 6)
    bands[1:] = 0
    only_sums = make_codec("mixed", layout).fit(x, weights=bands)
    assert only_sums.bits[1:].sum() == 0 and only_sums.bits[0].sum() > 40
    assert not make_codec("int4", layout).uses_weights and plain.uses_weights
    same(make_codec("int4", layout).fit(x, weights=weights).tensors(), make_codec("int4", layout).fit(x).tensors())


@pytest.mark.parametrize("name", ["mixed", "int4", "fp16"])
@pytest.mark.parametrize(
    "weights",
    [torch.ones(5), torch.ones(6).double(), -torch.ones(6), torch.full((6,), torch.nan), torch.ones(2, 6)],
)
def test_wrong_weights_are_refused(name, weights):
    with pytest.raises(ValueError, match=f"weights of codec '{name}' must be"):
        make_codec(name, MAP).fit(smooth(MAP), weights=weights)


def test_channel_without_bits_is_its_mean():
    layout = layout_of((40, 3))
    x = torch.randn(30, 40, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1.0, 1e-3]) + 2
    codec = make_codec("mixed@1.5", layout).fit(x)
    assert codec.bits[0, 2] == 0 and codec.bits.sum() == 4
    back = codec.decode(codec.encode(x))[..., 2]
    assert torch.all(back == back[0, 0])
    torch.testing.assert_close(back[0, 0], x[..., 2].mean(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", RATES)
@EXAMPLES
@given(case=features(), data=st.data())
def test_narrowed_has_the_same_size_fitted_or_not(name, case, data):
    layout, x = case
    channels = data.draw(st.lists(st.integers(0, layout.channels - 1), min_size=1, unique=True).map(sorted))
    channels = torch.tensor(channels)
    codec = make_codec(name, layout)
    unfitted = codec.narrowed(channels)
    fitted = codec.fit(x).narrowed(channels)
    assert not unfitted.fitted and fitted.fitted and fitted.name == name
    assert unfitted.columns == fitted.columns and unfitted.row_bytes == fitted.row_bytes
    part = layout.body(x).index_select(layout.channel_dim + 1, channels)
    rows = fitted.encode(part)
    assert rows["base"].shape[1] == unfitted.row_bytes
    assert fitted.decode(rows).shape == part.shape
    again = make_codec(name, fitted.layout).load_tensors(fitted.tensors())
    same(again.encode(part), rows)


@pytest.mark.parametrize("layout", [MAP, TOKENS])
@pytest.mark.parametrize("name", RATES)
def test_mixed_error_is_at_most_half_a_step_of_each_band(layout, name):
    x = smooth(layout)
    codec = make_codec(name, layout).fit(x)
    true, got = (to_bands(layout.body(t), layout) for t in (x, codec.decode(codec.encode(x))))
    chosen = codec.bits[..., None]
    scale, offset = (codec.tensors()[key].gather(2, chosen) for key in ("scale", "offset"))
    expected = torch.minimum(torch.maximum(true, offset), offset + scale * ((1 << chosen) - 1))
    assert ((got - expected).abs() <= scale / 2 * (1 + 1e-4) + 1e-4).all()


@pytest.mark.parametrize("layout", [MAP, TOKENS, layout_of((5, 3)), layout_of((3,))])
@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_channels_of_mixed_come_back_exactly(layout, dtype):
    layout = FeatureLayout(layout.shape, layout.grid, layout.special_tokens, dtype)
    x = torch.randn(6, *layout.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x.select(layout.channel_dim + 1, 1).fill_(-3.14159)
    codec = make_codec("mixed", layout).fit(x)
    back = codec.decode(codec.encode(x))
    constant, found = (body(layout, t).select(layout.channel_dim + 1, 1) for t in (x, back))
    assert back.dtype == dtype and torch.equal(found, constant)


def test_mixed_survives_extreme_ranges():
    x = smooth(TOKENS)
    x[..., 0] *= 1e-42
    x[0, 3, 1], x[0, 4, 1], x[1, 7, 2] = 3e38, -3e38, 3e38
    codec = make_codec("mixed", TOKENS).fit(x[:, :], weights=torch.full((6,), 1e-38))
    x[:, 0] = 0
    assert codec.decode(codec.encode(x)).isfinite().all()


def test_wrong_tensors_of_mixed_are_refused():
    codec = make_codec("mixed", MAP)
    good = make_codec("mixed", MAP).fit(smooth(MAP)).tensors()
    wrong = [
        {},
        {name: good[name] for name in ("error", "scale", "offset")},
        {**good, "scale": good["scale"][:, :5]},
        {**good, "scale": -good["scale"] - 1},
        {**good, "weight": good["weight"].double()},
        {**good, "offset": torch.full_like(good["offset"], torch.nan)},
    ]
    for tensors in wrong:
        with pytest.raises(ValueError, match="codec 'mixed'"):
            codec.load_tensors(tensors)
    assert not codec.fitted
    with pytest.raises(RuntimeError, match=r"call fit\(features\)"):
        _ = codec.bits
