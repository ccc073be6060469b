"""The packing of codes, the allocation of bits, and the codecs with a rate."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.codec_cases import DTYPES, EXAMPLES, NAMES, NEEDS_ZFP, body, features, layout_of, same

from hf_freezecache.augment.geometry import PROJECTIVE, geometry_column
from hf_freezecache.cache.codec import check_codec_name, make_codec
from hf_freezecache.cache.codec.allocation import allocate, coded_bytes
from hf_freezecache.cache.codec.haar import from_bands, to_bands
from hf_freezecache.cache.codec.packing import MOST_BITS, pack, packed_length, unpack
from hf_freezecache.cache.view_columns import ViewColumns, ViewSpec
from hf_freezecache.model.layout import FeatureLayout

MAP = FeatureLayout((6, 8, 8), (8, 8), 0, torch.float32)
TOKENS = FeatureLayout((65, 6), (8, 8), 1, torch.float32)
RATES = ("mixed@2", "mixed", "mixed@3.7", "mixed@6", "mixed@10")


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


# Packing


@EXAMPLES
@given(bits=st.integers(1, MOST_BITS), rows=st.integers(0, 3), values=st.integers(1, 70), data=st.data())
def test_unpacking_returns_the_packed_codes(bits, rows, values, data):
    seed = data.draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.uint8 if bits <= 8 else torch.int16
    codes = torch.randint(1 << bits, (rows, values), generator=generator).to(dtype)
    packed = pack(codes.clone(), bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, packed_length(values, bits))
    out = torch.empty_like(codes)
    unpack(packed, bits, out)
    assert torch.equal(out, codes)
    assert packed_length(values * 8, bits) == values * bits


def test_three_bits_are_a_plane_of_two_and_a_plane_of_one():
    codec = make_codec("int3", layout_of((1, 9, 1)))
    codec.load_tensors({"scale": torch.ones(1), "offset": torch.zeros(1)})
    base = codec.encode(torch.tensor([1.0, 2, 7, 4, 5, 6, 0, 3, 7]).view(1, 1, 9, 1))["base"]
    low = [1 + 4 * 0 + 16 * 0, 2 + 4 * 1 + 16 * 3, 3 + 4 * 2 + 16 * 3]
    # Nine codes take three bytes of 2-bit codes (j, j + 3, j + 6) and two of 1-bit codes (j, j + 2, ...).
    assert base.shape == (1, 5)
    assert base[0, :3].tolist() == low
    ones = [code >> 2 for code in (1, 2, 7, 4, 5, 6, 0, 3, 7)]
    high = [sum(bit << slot for slot, bit in enumerate(ones[first::2])) for first in (0, 1)]
    assert base[0, 3:].tolist() == high


# Haar


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


# Allocation


@EXAMPLES
@given(
    st.lists(st.lists(st.floats(0, 100, width=32), min_size=4, max_size=4), min_size=1, max_size=4),
    st.integers(0, 12),
    st.data(),
)
def test_allocation_fits_and_is_near_the_best(errors, length, data):
    """Against all allocations; a greedy walk on convex hulls misses the best by at most its last step."""
    errors = torch.tensor(errors).sort(dim=1, descending=True).values
    weights = torch.tensor(
        data.draw(st.lists(st.floats(0.125, 8, width=32), min_size=len(errors), max_size=len(errors)))
    )
    bits = allocate(errors, weights, 8, length)
    assert coded_bytes(bits, 8) <= length

    def cost(chosen):
        return sum(float(w) * float(e[b]) ** 2 for w, e, b in zip(weights, errors, chosen, strict=True))

    every = itertools.product(range(4), repeat=len(errors))
    best = min(cost(chosen) for chosen in every if sum(chosen) <= length)
    largest = max(float(w) * float(e[0]) ** 2 for w, e in zip(weights, errors, strict=True))
    assert cost(bits) <= best + largest * (1 + 1e-6)


def test_allocation_of_halving_errors_is_the_known_one():
    """Where a bit halves the error, channels get log2 of their size more than others."""
    sizes = torch.tensor([1.0, 2.0, 8.0])
    errors = sizes[:, None] * 2.0 ** -torch.arange(8)
    assert allocate(errors, torch.ones(3), 8, 7) == [1, 2, 4]
    assert allocate(errors, torch.tensor([1.0, 16.0, 1.0]), 8, 9) == [1, 4, 4]
    assert allocate(errors, torch.zeros(3), 8, 7) == [1, 2, 4]
    assert allocate(errors, torch.tensor([1.0, 0.0, 1.0]), 8, 5)[1] == 0


# Mixed


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


# Views


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [MAP, TOKENS])
def test_views_of_every_codec_have_their_planned_size(layout, name):
    """Before the codec is fitted, a build's bytes are estimated from its views' columns."""
    channels = torch.tensor([0, 3, 4])
    spec = ViewSpec(1, PROJECTIVE, channels=channels, outside=torch.zeros(6))
    x, geometry = smooth(layout), torch.zeros(12, geometry_column(PROJECTIVE, layout.grid)[1])
    planned = ViewColumns(spec, make_codec(name, layout)).columns
    views = ViewColumns(spec, make_codec(name, layout).fit(x))
    rows = views.encode(1, x, geometry, range(12))
    assert views.columns == planned
    assert {key: row.shape[1] for key, row in rows.items()} == {key: length for key, (_, length) in planned.items()}
    back = views.decode({key.removesuffix("_1"): row for key, row in rows.items()})
    true = layout.body(x).index_select(layout.channel_dim + 1, channels)
    assert back["view"].shape == true.shape
    assert (back["view"] - true).square().mean() < 0.2 * true.var()
    assert ("view_special" in back) == (layout is TOKENS)


# Names


def test_names_with_and_without_rates_are_read():
    assert check_codec_name("mixed") == ("mixed", 2.5)
    assert check_codec_name("mixed@3.5") == ("mixed", 3.5)
    assert check_codec_name("zfp") == ("zfp", 4.0)
    assert check_codec_name("zfp@8") == ("zfp", 8.0)
    assert check_codec_name("int3") == ("int3", None)
    assert make_codec("mixed@3.50", MAP).name == "mixed@3.50"


@pytest.mark.parametrize("name", ["mixed@", "mixed@0", "mixed@13", "mixed@-2", "mixed@nan", "mixed@2e0", "zfp@33"])
def test_wrong_rates_are_refused(name):
    family = name.partition("@")[0]
    with pytest.raises(ValueError, match=rf"'{name}': the rate of {family} is a number of bits from 1 to .*{family}@"):
        make_codec(name, MAP)


@pytest.mark.parametrize("name", ["int4@4", "int4@", "fp32@32"])
def test_rates_of_codecs_without_one_are_refused(name):
    with pytest.raises(ValueError, match="has no rate; leave '@"):
        make_codec(name, MAP)


# ZFP


@NEEDS_ZFP
@pytest.mark.parametrize("layout", [MAP, TOKENS, layout_of((6, 6)), layout_of((5,)), layout_of((3, 5, 7))])
def test_zfp_rate_sets_size_and_error(layout):
    x = torch.randn(5, *layout.shape, generator=torch.Generator().manual_seed(0))
    errors = []
    for rate in (4, 8, 16):
        codec = make_codec(f"zfp@{rate}", layout)
        assert codec.fitted and codec.tensors() == {}
        assert codec.encode(x)["base"].shape == (5, codec.columns["base"][1])
        errors.append(float(error(codec, x).sum()))
    assert errors[0] > 8 * errors[1] > 64 * errors[2]


@NEEDS_ZFP
@pytest.mark.parametrize("shape", [(8, 8, 12), (64, 8)])
def test_zfp_of_whole_blocks_has_exactly_its_rate(shape):
    for rate in (2, 4, 8):
        assert make_codec(f"zfp@{rate}", layout_of(shape)).bits_per_value == rate


@NEEDS_ZFP
def test_zfp_narrowed_and_special_tokens():
    x = smooth(TOKENS)
    codec = make_codec("zfp@8", TOKENS)
    narrowed = codec.narrowed(torch.tensor([1, 2, 5]))
    assert narrowed.layout.channels == 3 and narrowed.name == "zfp@8"
    part = TOKENS.body(x)[..., [1, 2, 5]]
    assert (narrowed.decode(narrowed.encode(part)) - part).abs().max() < 0.5
    assert codec.for_special_tokens().name == "fp16"
    assert torch.equal(codec.decode(codec.encode(x))[:, 0], x[:, 0].half().float())


def test_zfp_without_zfpy_says_what_to_install(monkeypatch):
    monkeypatch.setattr("hf_freezecache.cache.codec.zfp.zfpy", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_freezecache\[zfp\]'"):
        make_codec("zfp@2", MAP)
