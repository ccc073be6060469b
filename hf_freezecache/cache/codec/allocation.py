"""Allocation of bits to channels."""

import heapq

import torch

from .packing import WIDTHS, plane_length


def allocate(errors: torch.Tensor, weights: torch.Tensor, positions: int, length: int) -> list[int]:
    """Distributes the bytes of a row over channels so that the weighted sum of squared errors becomes small.

    All channels start with 0 bits. Each step gives one channel more bits: the step, of one bit or several (the lower
    convex hull of the channel's errors), that lowers the sum most per bit. It ends when no step fits any more (Shoham
    and Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers"). Equal inputs give equal bits on
    every machine: the layout of a stored row follows from them, so this function is part of the store's format.

    Args:
        errors: float32 `(I, L)`, root mean squared error of a channel with 0 to L - 1 bits.
        weights: float32 `(I,)`, factor of a channel's squared error; equal factors if all are 0.
        positions: number of values of a channel.
        length: number of bytes for all codes.

    Returns:
        Number of bits of every channel, I integers.

    Shapes: I channels, L numbers of bits.
    """
    squares = errors.double().square()
    # Products of tiny weights and tiny errors could be 0, so both are scaled: only ratios count.
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
    # Each plane is rounded up to whole bytes, which may exceed the length: then the last steps are undone.
    while coded_bytes(bits, positions) > length:
        channel, before = steps.pop()
        bits[channel] = before
    return bits


def coded_bytes(bits: list[int], positions: int) -> int:
    """Number of bytes of all codes; equal planes of all channels are packed together.

    Args:
        bits: number of bits of every channel.
        positions: number of values of a channel.
    """
    return sum(
        plane_length(sum(width & channel_bits > 0 for channel_bits in bits) * positions, width) for width in WIDTHS
    )


def _best_step(costs: list[float], bits: int, channel: int) -> list[tuple[float, int, int]]:
    """The best next step of a channel for the heap: `(change of the sum per bit, channel, bits after)`, or nothing."""
    steps = [((costs[more] - costs[bits]) / (more - bits), channel, more) for more in range(bits + 1, len(costs))]
    best = min(steps, default=(0.0, channel, bits))
    return [best] if best[0] < 0 else []
