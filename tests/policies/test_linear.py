"""Depth that grows with the epochs, step by step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.policies import EXAMPLES, cuts

from hf_freezecache.policies import LinearPolicy


@pytest.mark.parametrize(
    ("start", "end", "fraction", "stages", "blocks", "epochs"),
    [
        (0.25, 0.5, 0.75, 2, 13, 12),
        (0.25, 0.5, 0.75, 2, 13, 10),
        (0.0, 1.0, 1.0, 4, 12, 20),
        (0.3, 0.3, 0.5, 1, 12, 10),
        (0.1, 0.9, 0.6, 5, 17, 30),
    ],
)
def test_linear_follows_its_formula(start, end, fraction, stages, blocks, epochs):
    from fractions import Fraction
    from math import ceil

    exact = {name: Fraction(str(value)) for name, value in dict(start=start, end=end, fraction=fraction).items()}
    expected = []
    for epoch in range(epochs):
        cut = 0
        for stage in range(1, stages + 1):
            when = exact["start"] + (exact["end"] - exact["start"]) * Fraction(stage - 1, max(stages - 1, 1))
            if epoch >= ceil(when * epochs):
                cut = round(exact["fraction"] * blocks * Fraction(stage, stages))
        expected.append(cut)
    assert cuts(LinearPolicy(start, end, fraction, stages), epochs, blocks) == expected


def test_linear_defaults_freeze_in_two_steps():
    # 13 blocks: round(.375 * 13) = 5 at a quarter, round(.75 * 13) = 10 at half of 12 epochs.
    assert cuts(LinearPolicy(), 12, 13) == [0] * 3 + [5] * 3 + [10] * 6


@EXAMPLES
@given(
    st.tuples(st.integers(0, 100), st.integers(0, 100)).map(sorted),
    st.integers(0, 100),
    st.integers(1, 6),
    st.integers(1, 40),
    st.integers(1, 60),
)
def test_linear_never_decreases_nor_passes_its_bounds(window, most, stages, blocks, epochs):
    policy = LinearPolicy(window[0] / 100, window[1] / 100, most / 100, stages)
    found = cuts(policy, epochs, blocks)
    assert found == sorted(found)
    assert all(0 <= cut <= round(most / 100 * blocks) for cut in found)
