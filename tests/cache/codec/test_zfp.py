"""ZFP as a codec."""

import pytest
import torch
from support.codec_cases import MAP, NEEDS_ZFP, TOKENS, error, layout_of, smooth

from hf_freezecache.cache.codec import make_codec


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
