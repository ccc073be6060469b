"""Properties of the codecs, over layouts of every kind."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.codec_cases import DTYPES, EXAMPLES, MAP, NAMES, QUANTIZED, body, features, layout_of, per_channel, same

from hf_freezecache.cache.codec import check_codec_name, make_codec
from hf_freezecache.model.layout import FeatureLayout


@EXAMPLES
@given(features())
def test_fp32_round_trip_is_exact(case):
    layout, x = case
    codec = make_codec("fp32", layout)
    back = codec.decode(codec.encode(x))
    assert back.dtype == layout.dtype and back.shape == x.shape
    integer = torch.int32 if layout.dtype == torch.float32 else torch.int16
    assert torch.equal(back.view(integer), x.view(integer))


@EXAMPLES
@given(features())
def test_fp16_round_trip_is_the_cast(case):
    layout, x = case
    codec = make_codec("fp16", layout)
    assert torch.equal(codec.decode(codec.encode(x)), x.half().to(layout.dtype))
    if layout.dtype == torch.float16:
        assert torch.equal(codec.decode(codec.encode(x)), x)


@pytest.mark.parametrize("name", QUANTIZED)
@EXAMPLES
@given(case=features())
def test_quantized_error_is_at_most_half_a_step_inside_the_clip_range(name, case):
    layout, x = case
    codec = make_codec(name, layout).fit(x)
    back = codec.decode(codec.encode(x))
    assert back.dtype == layout.dtype and back.shape == x.shape
    scale, offset = (per_channel(layout, codec.tensors()[key]).double() for key in ("scale", "offset"))
    top = offset + scale * (2 ** QUANTIZED[name] - 1)
    true, got = body(layout, x).double(), body(layout, back).double()
    # Beside half a step, the rounding of the float32 arithmetic and of the layout's own type.
    rounding = torch.finfo(layout.dtype).eps * got.abs() + 4 * torch.finfo(torch.float32).eps * (true - offset).abs()
    rounding += 1e-6 * scale + torch.finfo(torch.float32).eps * offset.abs() + torch.finfo(layout.dtype).tiny
    expected = true.clamp(offset, top)
    assert ((got - expected).abs() <= scale / 2 + rounding).all()


@pytest.mark.parametrize("name", QUANTIZED)
@EXAMPLES
@given(case=features())
def test_special_tokens_come_back_as_float16(name, case):
    layout, x = case
    codec = make_codec(name, layout).fit(x)
    rows, special = codec.encode(x), layout.special_tokens
    assert set(rows) == ({"base", "special"} if special else {"base"})
    assert torch.equal(
        codec.decode(rows)[:, :special] if special else x[:, :0], x[:, :special].half().to(layout.dtype)
    )


@pytest.mark.parametrize("name", QUANTIZED)
def test_fit_ignores_special_tokens(name):
    layout = layout_of((9, 5), special=2)
    x = torch.randn(4, 9, 5, generator=torch.Generator().manual_seed(0))
    loud = x.clone()
    loud[:, :2] *= 1000
    same(make_codec(name, layout).fit(x).tensors(), make_codec(name, layout).fit(loud).tensors())


@pytest.mark.parametrize("name", QUANTIZED)
@EXAMPLES
@given(case=features(dtypes=(torch.float32,)))
def test_encoding_again_gives_the_same_rows(name, case):
    layout, x = case
    codec = make_codec(name, layout).fit(x)
    rows = codec.encode(x)
    same(codec.encode(codec.decode(rows)), rows)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -3.14159, 1e-30, 3e4])
def test_constant_channels_come_back_exactly(name, dtype, value):
    layout = layout_of((5, 3), dtype=dtype)
    x = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[..., 1] = value
    codec = make_codec(name, layout).fit(x)
    assert torch.equal(codec.decode(codec.encode(x))[..., 1], x[..., 1])


@pytest.mark.parametrize("name", ["fp32", "fp16", *QUANTIZED])
@EXAMPLES
@given(case=features())
def test_row_size_follows_the_formula(name, case):
    layout, x = case
    codec = make_codec(name, layout).fit(x)
    special = layout.special_tokens * layout.channels if name in QUANTIZED else 0
    values = layout.values - special
    length = {
        "fp32": 4 * values,
        "fp16": 2 * values,
        "int8": values,
        "int4": (values + 1) // 2,
        "int3": (values + 3) // 4 + (values + 7) // 8,
        "int2": (values + 3) // 4,
    }[name]
    assert codec.columns["base"] == (torch.uint8, length)
    rows = codec.encode(x)
    assert {key: (row.dtype, row.shape[1]) for key, row in rows.items()} == codec.columns
    stored = sum(row.nbytes for row in rows.values()) / len(x)
    assert codec.row_bytes == stored == length + 2 * special
    assert codec.bits_per_value == 8 * stored / layout.values


def test_int4_packs_the_halves_of_a_row_into_the_halves_of_a_byte():
    codec = make_codec("int4", layout_of((1, 7, 1)))
    codec.load_tensors({"scale": torch.ones(1), "offset": torch.zeros(1)})
    rows = codec.encode(torch.tensor([1.0, 2, 3, 4, 5, 6, 15]).view(1, 1, 7, 1))
    assert rows["base"].tolist() == [[1 + 16 * 5, 2 + 16 * 6, 3 + 16 * 15, 4]]


@pytest.mark.parametrize("name", NAMES)
@EXAMPLES
@given(case=features())
def test_restored_codec_encodes_and_decodes_bit_identically(name, case):
    layout, x = case
    codec = make_codec(name, layout).fit(x)
    assert all(t.dtype == torch.float32 and t.device.type == "cpu" for t in codec.tensors().values())
    restored = make_codec(name, FeatureLayout.from_json(layout.to_json())).load_tensors(codec.tensors())
    assert restored.fitted
    same(restored.encode(x), codec.encode(x))
    assert torch.equal(restored.decode(codec.encode(x)), codec.decode(codec.encode(x)))


@pytest.mark.parametrize("name", NAMES)
@EXAMPLES
@given(case=features(batch=(2, 9)), data=st.data())
def test_rows_do_not_depend_on_their_batch(name, case, data):
    layout, x = case
    codec = make_codec(name, layout).fit(x)
    rows, back = codec.encode(x), codec.decode(codec.encode(x))
    chosen = data.draw(st.lists(st.integers(0, len(x) - 1), min_size=1, max_size=5))
    some = {key: row[chosen] for key, row in rows.items()}
    same(codec.encode(x[chosen]), some)
    assert torch.equal(codec.decode(some), back[chosen])


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_depend_on_chunks_or_memory_format(name):
    layout = layout_of((64, 97, 41))
    x = torch.randn(19, *layout.shape, generator=torch.Generator().manual_seed(0))
    codec = make_codec(name, layout).fit(x[:2])
    rows = codec.encode(x.to(memory_format=torch.channels_last))
    for row in (0, 7, 8, 16, 18):
        same({key: value[row : row + 1] for key, value in rows.items()}, codec.encode(x[row : row + 1]))


@pytest.mark.parametrize("name", NAMES)
def test_empty_batch_round_trips(name):
    layout = layout_of((5, 3), special=1)
    codec = make_codec(name, layout).fit(torch.randn(2, 5, 3))
    assert codec.decode(codec.encode(torch.empty(0, 5, 3))).shape == (0, 5, 3)


@pytest.mark.parametrize("name", NAMES)
def test_random_generators_stay_untouched(name):
    layout = layout_of((4100, 3))
    x = torch.randn(2, 4100, 3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = make_codec(name, layout).fit(x)
    first.decode(first.encode(x))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    torch.rand(1)
    same(first.tensors(), make_codec(name, layout).fit(x).tensors())


@pytest.mark.parametrize("name", NAMES)
def test_rows_and_features_share_no_memory(name):
    layout = layout_of((5, 3))
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    codec = make_codec(name, layout).fit(x)
    rows = codec.encode(x.clone().mul_(1))
    kept = {key: row.clone() for key, row in rows.items()}
    codec.decode(rows).fill_(7)
    same(rows, kept)
    y = x.clone()
    rows = codec.encode(y)
    y.zero_()
    same(rows, kept)


@pytest.mark.parametrize("name", NAMES)
def test_decode_takes_rows_at_any_byte_offset(name):
    layout = layout_of((5, 3))
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    codec = make_codec(name, layout).fit(x)
    base = codec.encode(x)["base"]
    shifted = torch.zeros(2, base.shape[1] + 3, dtype=torch.uint8)
    shifted[:, 1:-2] = base
    assert torch.equal(codec.decode({"base": shifted[:, 1:-2]}), codec.decode({"base": base}))


def test_features_that_require_grad_are_encoded():
    codec = make_codec("int4", layout_of((3,)))
    x = torch.randn(4, 3, requires_grad=True)
    assert not codec.decode(codec.fit(x).encode(x)).requires_grad


@pytest.mark.parametrize("tail", ["gaussian", "outliers", "relu", "shifted"])
def test_int4_clipping_is_no_worse_than_full_range_and_three_sigma(tail):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(16, 256, 12, generator=generator)
    if tail == "outliers":
        x[torch.rand(x.shape, generator=generator) < 1e-3] *= 40
    elif tail == "relu":
        x = x.relu() ** 2
    elif tail == "shifted":
        x = x * 1e-3 + 50
    codec = make_codec("int4", layout_of((256, 12))).fit(x)

    def error(codec):
        return (codec.decode(codec.encode(x)).double() - x.double()).square().mean(dim=(0, 1))

    def with_range(low, high):
        fixed = make_codec("int4", codec.layout)
        return fixed.load_tensors({"scale": (high - low) / 15, "offset": low})

    low, high = x.amin(dim=(0, 1)), x.amax(dim=(0, 1))
    sigma, mean = torch.std_mean(x, dim=(0, 1), correction=0)
    full = error(with_range(low, high))
    three = error(with_range(torch.maximum(low, mean - 3 * sigma), torch.minimum(high, mean + 3 * sigma)))
    assert (error(codec) <= full * 1.001).all()
    assert (error(codec) <= three * 1.001).all()
    if tail == "outliers":
        assert error(codec).sum() < full.sum() / 2


@pytest.mark.parametrize("name", QUANTIZED)
def test_fit_survives_extreme_ranges(name):
    x = torch.randn(4, 2000, 6, generator=torch.Generator().manual_seed(0))
    x[..., 0] *= 1e-42
    x[0, 0, 1] = 3e38
    x[0, 1, 2], x[0, 0, 2] = 3e38, -3e38
    x[..., 3] *= 1e37
    x[..., 4] = 1.0
    x[0, 7, 4] = 3e38
    codec = make_codec(name, layout_of((2000, 6))).fit(x)
    back = codec.decode(codec.encode(x))
    assert back.isfinite().all()
    # Two bits clip a Gaussian at 1.5 sigma.
    assert (back[..., 3] - x[..., 3]).abs().max() < 3.5e37


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("token", [0, 3])
def test_not_finite_feature_names_the_sample(name, bad, token):
    layout = layout_of((5, 3), special=1)
    x = torch.randn(4, 5, 3)
    codec = make_codec(name, layout).fit(x)
    x[2, token, 1] = bad
    with pytest.raises(ValueError, match="feature of sample 2 is not finite"):
        codec.encode(x)
    with pytest.raises(ValueError, match="feature of sample 1234 is not finite"):
        codec.encode(x, sample_ids=[7, 8, 1234, 9])
    with pytest.raises(ValueError, match="feature of sample 1234 is not finite"):
        make_codec(name, layout).fit(x, sample_ids=torch.tensor([7, 8, 1234, 9]))


def test_finite_features_whose_sum_overflows_are_accepted():
    x = torch.full((2, 3), 3e38)
    codec = make_codec("fp32", layout_of((3,)))
    assert torch.equal(codec.decode(codec.encode(x)), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp16_overflow_names_the_sample_and_the_way_out(dtype):
    codec = make_codec("fp16", layout_of((3,), dtype=dtype))
    x = torch.ones(3, 3, dtype=dtype)
    x[1, 2] = 1e5
    with pytest.raises(ValueError, match="sample 1 .*65504.*'fp32' or 'int8'"):
        codec.encode(x)
    with pytest.raises(ValueError, match="sample 55 "):
        codec.encode(x, sample_ids=[44, 55, 66])


@pytest.mark.parametrize("name", QUANTIZED)
def test_special_token_overflow_names_the_sample_and_the_way_out(name):
    x = torch.randn(3, 5, 3)
    codec = make_codec(name, layout_of((5, 3), special=1)).fit(x)
    x[1, 0, 0] = -1e5
    with pytest.raises(ValueError, match="sample 1 .*65504.*'fp32'"):
        codec.encode(x)
    x[1, 0, 0], x[1, 1, 0] = 0, -1e5
    codec.encode(x)


@pytest.mark.parametrize("name", QUANTIZED)
def test_codec_before_fit_asks_for_fit(name):
    codec = make_codec(name, layout_of((3,)))
    assert not codec.fitted
    for call in (lambda: codec.encode(torch.randn(2, 3)), lambda: codec.decode({}), codec.tensors):
        with pytest.raises(RuntimeError, match=r"call fit\(features\)"):
            call()


@pytest.mark.parametrize("name", NAMES)
def test_wrong_features_name_expected_and_got(name):
    x = torch.randn(2, 5, 3)
    codec = make_codec(name, layout_of((5, 3))).fit(x)
    for wrong in (x[:, :4], x[0], x.flatten(1)):
        for call in (codec.encode, codec.fit):
            with pytest.raises(ValueError, match=rf"shape \(B, 5, 3\), got \({', '.join(map(str, wrong.shape))}\)"):
                call(wrong)
    with pytest.raises(ValueError, match="dtype torch.float32, got torch.float16"):
        codec.encode(x.half())
    with pytest.raises(ValueError, match="1 sample ids for 2 features"):
        codec.encode(x, sample_ids=[1])
    with pytest.raises(ValueError, match="empty batch"):
        codec.fit(x[:0])


@pytest.mark.parametrize("name", NAMES)
def test_wrong_rows_name_the_column(name):
    layout = layout_of((5, 3), special=1)
    x = torch.randn(2, 5, 3)
    codec = make_codec(name, layout).fit(x)
    rows = codec.encode(x)
    for column, row in rows.items():
        with pytest.raises(ValueError, match=f"needs the column '{column}'"):
            codec.decode({key: value for key, value in rows.items() if key != column})
        for wrong in (row[:, 1:], row[0], row.to(torch.int64)):
            with pytest.raises(ValueError, match=f"column '{column}' .* of shape"):
                codec.decode({**rows, column: wrong})


def test_wrong_tensors_are_refused():
    codec = make_codec("int4", layout_of((3,)))
    good = {"scale": torch.ones(3), "offset": torch.zeros(3)}
    wrong = [
        {},
        {"scale": torch.ones(3)},
        {**good, "extra": torch.ones(3)},
        {**good, "scale": torch.ones(4)},
        {**good, "scale": -torch.ones(3)},
        {**good, "offset": torch.full((3,), torch.nan)},
        {**good, "offset": torch.zeros(3, dtype=torch.float16)},
    ]
    for tensors in wrong:
        with pytest.raises(ValueError, match="codec 'int4'"):
            codec.load_tensors(tensors)
    assert not codec.fitted
    with pytest.raises(ValueError, match="no tensors"):
        make_codec("fp32", codec.layout).load_tensors(good)


def test_unknown_codec_lists_the_valid_ones():
    with pytest.raises(
        ValueError, match="unknown codec 'int5'; choose one of fp32, fp16, int8, int4, int3, int2, mixed, zfp"
    ):
        make_codec("int5", layout_of((3,)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_device_and_cpu_agree_bit_for_bit(name, dtype):
    layout = layout_of((197, 33), special=1, dtype=dtype)
    x = torch.randn(9, 197, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    codec = make_codec(name, layout).fit(x)
    rows = codec.encode(x)
    there = codec.encode(x.cuda())
    assert all(row.is_cuda for row in there.values())
    same({key: row.cpu() for key, row in there.items()}, rows)
    back = codec.decode(there)
    assert back.is_cuda
    assert torch.equal(back.cpu(), codec.decode(rows))
    assert make_codec(name, layout).fit(x.cuda()).fitted


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


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
def test_decoded_features_may_be_written_to(name):
    """As by SpecAugment, whose mask is a parameter."""
    features = torch.randn(4, 6, 8)
    codec = make_codec(name, FeatureLayout((6, 8), None, 0, torch.float32)).fit(features)
    decoded = codec.decode(codec.encode(features))
    decoded[:, 0] = torch.zeros(8, requires_grad=True)
    assert decoded.requires_grad
