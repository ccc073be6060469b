"""Directions come again from their number, have the length they should, and leave the weights where they were."""

import math

import pytest
import torch
from torch import nn

from hf_freezecache.rng import RngState
from hf_freezecache.zeroth_order import numbers as numbers_module
from hf_freezecache.zeroth_order.lfsr import RotatedLFSRs
from hf_freezecache.zeroth_order.numbers import FreshNumbers, OnTheFly, Piece, Pool
from hf_freezecache.zeroth_order.perturbation import Displacement, Perturbation, gaussian_modulus

CPU = torch.device("cpu")
SHAPES = [(13, 7), (5,), (3, 4, 2), (1,)]
LENGTH = sum(math.prod(shape) for shape in SHAPES)
SOURCES = {
    "gaussian": lambda length, seed: FreshNumbers("gaussian", seed),
    "uniform": lambda length, seed: FreshNumbers("uniform", seed),
    "pool": lambda length, seed: Pool(length, 37, 8, seed),
    "on the fly": lambda length, seed: OnTheFly(length, 8, 6, seed),
}


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def direction(source, number, scaling="none", frozen=(), seed=1):
    """A direction as the weights show it, a tensor for each parameter."""
    weights = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    for place in frozen:
        weights[place].requires_grad_(False)
    Perturbation(weights, SOURCES[source](LENGTH, seed), scaling).add(number, 1.0)
    return [weight.detach() for weight in weights]


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("source", SOURCES)
def test_direction_comes_again_from_seed_and_number(source):
    before = RngState()
    first = flat(direction(source, 5))
    assert torch.equal(flat(direction(source, 5)), first)
    assert not torch.equal(flat(direction(source, 6)), first)
    assert not torch.equal(flat(direction(source, 5, seed=2)), first)
    assert before.is_current()


@pytest.mark.parametrize("source", SOURCES)
def test_frozen_parameters_stay_and_do_not_change_the_others(source):
    whole, rest = direction(source, 3), direction(source, 3, frozen=[0, 2])
    assert not rest[0].any() and not rest[2].any()
    assert torch.equal(rest[1], whole[1]) and torch.equal(rest[3], whole[3])


@pytest.mark.parametrize("source", SOURCES)
def test_parameters_with_other_strides_are_moved_as_well(source):
    weight = nn.Parameter(torch.zeros(4, 3, 5, 5).to(memory_format=torch.channels_last))
    Perturbation([weight], SOURCES[source](weight.numel(), 1), "exact").add(0, 1.0)
    assert float(weight.detach().norm()) == pytest.approx(gaussian_modulus(300), rel=1e-5)


@pytest.mark.parametrize("source", ["uniform", "pool", "on the fly"])
@pytest.mark.parametrize("frozen", [(), (0,)])
def test_scaled_direction_is_as_long_as_a_gaussian_one(source, frozen):
    for number in range(4):
        plain = flat(direction(source, number, frozen=frozen))
        count = LENGTH - sum(math.prod(SHAPES[place]) for place in frozen)
        factor = gaussian_modulus(count) / float(plain.norm())
        exact = flat(direction(source, number, "exact", frozen))
        assert torch.allclose(exact, plain * factor, rtol=1e-5)
        shifted = flat(direction(source, number, "power_of_two", frozen))
        power = 2.0 ** round(math.log2(factor))
        assert torch.equal(shifted, plain * power) and 0.7 < power / factor < 1.42


def test_expected_length_of_gaussian_vectors():
    assert gaussian_modulus(1) == pytest.approx(math.sqrt(2 / math.pi))
    assert gaussian_modulus(2) == pytest.approx(math.sqrt(math.pi / 2))
    assert gaussian_modulus(10_001) == pytest.approx(gaussian_modulus(10_000) * math.sqrt(10_001 / 10_000), rel=1e-8)
    drawn = torch.randn(4000, 20, generator=torch.Generator().manual_seed(0)).norm(dim=1)
    assert float(drawn.mean()) == pytest.approx(gaussian_modulus(20), rel=0.01)


@pytest.mark.parametrize("size", [37, 64, 11, 512])
def test_pool_is_read_on_where_the_perturbation_before_has_ended(size):
    """Where the size divides the length as well: then a number is left out, or all directions would be one."""
    length = 64
    pool = Pool(length, size, 8, seed=0)
    skipped = pool.stride - length
    assert skipped == (0 if math.gcd(length, size) == 1 else 1)
    long = pool.values.repeat(10 * length)
    for number in range(5):
        start = number * (length + skipped)
        assert torch.equal(pool.take(Piece(number, 0, length), CPU), long[start : start + length])
    starts = {pool.start(Piece(number, 0, length)) for number in range(size)}
    assert len(starts) == size


@pytest.mark.parametrize(("bits", "registers"), [(6, 8), (12, 31)])
def test_numbers_on_the_fly_are_those_of_the_registers(bits, registers):
    source = OnTheFly(LENGTH, registers, bits, seed=1)
    for number in (0, 2, 3_001):
        expected = RotatedLFSRs(bits, registers, seed=1).numbers(number * source.stride + 3, 50)
        half = 2 ** (bits - 1)
        assert torch.equal(source.take(Piece(number, 3, 50), CPU), (expected - half) / half)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_numbers_of_registers_are_spread_evenly_around_zero(bits):
    source = OnTheFly(10, 1, bits, seed=0)
    values = source.take(Piece(0, 0, 2**bits - 1), CPU)
    assert float(values.sum()) == 0.0 and -1 < float(values.min()) == -float(values.max())
    assert float(values.square().mean()) == pytest.approx(1 / 3, rel=0.15)


@pytest.mark.parametrize(("bits", "registers"), [(4, 3), (8, 8), (11, 5)])
def test_short_periods_that_are_kept_give_the_numbers_of_long_ones(bits, registers, monkeypatch):
    """Pieces within a period, over its end, and longer than it."""
    numbers, looked_up = OnTheFly(10**6, registers, bits, 1), OnTheFly(10**6, registers, bits, 1)
    monkeypatch.setattr(looked_up, "_is_kept", False)
    assert numbers._is_kept
    pieces = [Piece(k, 3, length) for k in (0, 1, 50) for length in (1, 40, numbers.period, 2 * numbers.period + 3)]
    assert all(torch.equal(numbers.take(piece, CPU), looked_up.take(piece, CPU)) for piece in pieces)


@pytest.mark.parametrize("source", ["pool", "on the fly"])
def test_squares_are_those_of_the_numbers(source):
    numbers = SOURCES[source](LENGTH, 3)
    for position in (0, 1, 7, 8, 60, 1000):
        for length in (1, 5, 8, 17, 40, 700):
            piece = Piece(3, position, length)
            expected = float(numbers.take(piece, CPU).double().square().sum())
            assert numbers.squares([piece], CPU) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_numbers_that_are_drawn_are_counted():
    sources = {name: make(LENGTH, 0) for name, make in SOURCES.items()}
    for source in sources.values():
        perturbation = Perturbation(parameters(), source, "none")
        perturbation.add(0, 1e-3)
        perturbation.add(0, -1e-3)
    assert {name: source.drawn for name, source in sources.items()} == {
        "gaussian": 2 * LENGTH,
        "uniform": 2 * LENGTH,
        "pool": 37,
        "on the fly": 2 * LENGTH,
    }


@pytest.mark.parametrize("source", SOURCES)
def test_large_parameters_are_moved_in_pieces(source, monkeypatch):
    monkeypatch.setattr(numbers_module, "PIECE", 10)
    monkeypatch.setattr("hf_freezecache.zeroth_order.perturbation.PIECE", 10)
    taken = []
    weights = parameters()
    numbers = SOURCES[source](LENGTH, 1)
    take = numbers.take
    numbers.take = lambda piece, device: taken.append(piece) or take(piece, device)
    perturbation = Perturbation(weights, numbers, "none")
    before = flat(weights).detach().clone()
    perturbation.add(2, 1.0)
    assert max(piece.length for piece in taken) == 10 and sum(piece.length for piece in taken) == LENGTH
    expected = torch.cat([take(piece, CPU) for piece in taken])
    assert torch.equal(flat(weights), before + expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("source", SOURCES)
def test_copied_weights_come_back_bit_for_bit(source, dtype):
    weights = parameters(dtype)
    before = [weight.detach().clone() for weight in weights]
    perturbation = Perturbation(weights, SOURCES[source](LENGTH, 1), "exact" if source != "gaussian" else "none")
    with Displacement(perturbation, exact=True) as displacement:
        for number in range(20):
            displacement.move(number, 1e-2)
            assert not torch.equal(weights[0], before[0])
            displacement.move(number, -1e-2)
    assert all(torch.equal(*pair) for pair in zip(weights, before, strict=True))


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 1e-5), (torch.float16, 1e-1), (torch.bfloat16, 1.0)], ids=str
)
def test_subtracted_weights_drift_by_rounding_errors(dtype, most):
    """Over 100 steps; the largest drift relative to the standard deviation of the weights, which is 1."""
    weights = parameters(dtype)
    before = [weight.detach().clone() for weight in weights]
    perturbation = Perturbation(weights, FreshNumbers("gaussian", 1), "none")
    for number in range(100):
        with Displacement(perturbation, exact=False) as displacement:
            displacement.move(number, 1e-3)
            displacement.move(number, -1e-3)
    drift = max(float((now.detach() - then).abs().max()) for now, then in zip(weights, before, strict=True))
    assert most / 20 < drift < most


@pytest.mark.parametrize("exact", [True, False])
def test_weights_come_back_after_an_error(exact):
    weights = parameters()
    before = flat(weights).detach().clone()
    perturbation = Perturbation(weights, FreshNumbers("gaussian", 1), "none")
    with pytest.raises(KeyError), Displacement(perturbation, exact) as displacement:
        displacement.move(0, 1e-3)
        raise KeyError("the loss")
    assert torch.allclose(flat(weights), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_descent_is_the_sum_of_directions_and_is_rounded_once(dtype):
    [weight] = weights = [nn.Parameter(torch.randn(40).to(dtype))]
    before = weight.detach().clone()
    perturbation = Perturbation(weights, FreshNumbers("gaussian", 1), "none")
    z = [perturbation.numbers.take(Piece(number, 0, 40), CPU) for number in (4, 5)]
    perturbation.descend(weights, {4: 2.0, 5: -0.5}, rate=0.1, decay=0.01)
    expected = before.double() - 0.1 * (2 * z[0] - z[1] / 2 + 0.01 * before).double()
    assert torch.allclose(weight.double(), expected, rtol=1e-6 if dtype == torch.float32 else 2**-8, atol=1e-7)


@pytest.mark.parametrize("weight", [torch.zeros(3, dtype=torch.complex64), torch.zeros(3, dtype=torch.int8)])
def test_other_weights_are_refused(weight):
    with pytest.raises(ValueError, match="cannot be moved"):
        Perturbation([weight], FreshNumbers("gaussian", 1), "none")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pool(10, 1, 8, 0), "2 at least"),
        (lambda: Pool(10, 8, 20, 0), "4 to 16 bits"),
        (lambda: OnTheFly(10, 8, 3, 0), "4 to 16 bits"),
        (lambda: OnTheFly(10, 300, 8, 0), "1 to 255"),
    ],
)
def test_impossible_sources_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_move_that_is_interrupted_is_undone(fails_at, monkeypatch):
    """Weights of three lots; the numbers of one cannot be made, as memory is full."""
    weights = [nn.Parameter(torch.randn(numbers_module.PIECE)) for _ in range(3)]
    before = [weight.detach().clone() for weight in weights]
    perturbation = Perturbation(weights, FreshNumbers("gaussian", 0), "none")
    take, calls = perturbation.numbers.take_each, []

    def failing(pieces, device):
        calls.append(pieces)
        if len(calls) == 4 + fails_at:  # in the move to the other side
            raise torch.OutOfMemoryError("no memory")
        return take(pieces, device)

    monkeypatch.setattr(perturbation.numbers, "take_each", failing)
    with pytest.raises(torch.OutOfMemoryError), Displacement(perturbation, exact=False) as displacement:
        displacement.move(0, 1e-3)
        displacement.move(0, -1e-3)
    assert all(torch.allclose(weight, own, atol=1e-6) for weight, own in zip(weights, before, strict=True))


def test_accelerators_without_double_precision_count_on_the_cpu(monkeypatch):
    monkeypatch.setattr(numbers_module, "_WITHOUT_DOUBLE", {"meta"})
    with pytest.raises(NotImplementedError):  # as the values would have to come to the CPU
        numbers_module.as_double(torch.ones(2, device="meta"))
    assert numbers_module.as_double(torch.ones(2)).dtype == torch.float64
