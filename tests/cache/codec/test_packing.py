"""Codes of some bits in bytes."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.codec_cases import EXAMPLES, layout_of

from hf_freezecache.cache.codec import make_codec
from hf_freezecache.cache.codec.packing import MOST_BITS, pack, packed_length, unpack


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
