"""Bits for every channel and band."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.codec_cases import EXAMPLES

from hf_freezecache.cache.codec.allocation import allocate, coded_bytes


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
