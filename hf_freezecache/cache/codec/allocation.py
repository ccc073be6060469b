"""Which channel gets how many bits."""

import heapq

import torch

from .packing import WIDTHS, plane_length


def allocate(errors: torch.Tensor, weights: torch.Tensor, positions: int, length: int) -> list[int]:
    """Spends the bytes of a row where they take the most weighted squared error away.

    Starts without a bit and takes, again and again, the step of some channel (by one bit or several: the lower convex
    hull of its errors) that wins most a bit, until no step fits (Shoham and Gersho, 1988). Equal inputs give equal
    bits on every machine; the bits of a stored row follow from it, so that it is part of the store's format.

    Args:
        errors: float32 `(I, L)`, root mean squared error of a channel with 0 .. L - 1 bits.
        weights: float32 `(I,)`, what a squared error costs; all the same if all are 0.
        positions: values of a channel.
        length: bytes that the codes may take.

    Returns:
        The bits of every channel.
    """
    squares = errors.double().square()
    # Weights may be tiny, and their products with tiny errors 0: only ratios count.
    scaled = (
        weights.double() / weights.double().max() if weights.any() else torch.ones(len(errors), dtype=torch.double)
    )
    costs = (squares / squares.max().clamp(min=1e-300) * scaled[:, None]).tolist()
    bits, steps, left = [0] * len(costs), [], 8 * length // positions

    heap = [entry for channel in range(len(costs)) for entry in _best_step(costs[channel], 0, channel)]
    heapq.heapify(heap)
    while heap and left:
        _, channel, target = heapq.heappop(heap)
        step = target - bits[channel]
        if step > left:
            continue
        steps.append((channel, bits[channel]))
        bits[channel], left = target, left - step
        for entry in _best_step(costs[channel], target, channel):
            heapq.heappush(heap, entry)
    # Each plane ends in whole bytes: what does not fit is taken back.
    while coded_bytes(bits, positions) > length:
        channel, before = steps.pop()
        bits[channel] = before
    return bits


def coded_bytes(bits: list[int], positions: int) -> int:
    """Bytes of all codes, each plane of all channels packed together."""
    return sum(plane_length(sum(width & own > 0 for own in bits) * positions, width) for width in WIDTHS)


def _best_step(costs: list[float], bits: int, channel: int) -> list[tuple[float, int, int]]:
    """The next step of a channel, as a heap's entry `(- what a bit wins, channel, bits after)`; none if none wins."""
    steps = [((costs[more] - costs[bits]) / (more - bits), channel, more) for more in range(bits + 1, len(costs))]
    best = min(steps, default=(0.0, channel, bits))
    return [best] if best[0] < 0 else []
