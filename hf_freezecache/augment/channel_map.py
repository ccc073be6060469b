"""Channels of a view from those of its base view, where warping each one alone does not give them.

A filter that sees left edges answers to a mirrored image where another one answered before: the features of a mirrored
view are not the mirrored features, channel by channel, but they nearly are a linear map of them. One map is fitted to
views that are mirrored and one to those that are not, by ridge regression on the sample on which the channels'
similarity is measured, from all warped channels and the sensitive ones, which are kept of every view. A position's
neighbours count too, where that is affordable: interpolation between positions blurs, and they sharpen.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Share of the mean square of the inputs that is added to each: what hardly varies gets no weight.
_RIDGE = 1e-3
# Positions per unknown below which a map is not fitted.
_POSITIONS_PER_INPUT = 4
# Positions of a batch that are looked at: more cost time and change nothing.
_POSITIONS = 2048
# Inputs up to which the neighbours count.
_MOST_INPUTS = 2048


class ChannelMapFit:
    """Accumulates what a map can be fitted to, in two halves that judge each other.

    Args:
        channels: number of them.
        grid: `(h, w)` of their maps.
    """

    def __init__(self, channels: int, grid: tuple[int, int]):
        self.channels = channels
        self.side = 3 if min(grid) > 1 and 9 * channels <= _MOST_INPUTS else 1
        self.warped_inputs = channels * self.side**2
        size = self.warped_inputs + channels + 1
        # (half, mirrored or not, inputs, inputs); the inputs are warped channels, true channels and one.
        self._products = torch.zeros(2, 2, size, size, dtype=torch.float64)
        self._batches = 0

    def will_fit(self, kept: int, positions: float, updates: int) -> bool:
        """Whether a map for one kind of view will be fitted, mirrored ones or the others.

        Args:
            kept: channels that are kept of every view.
            positions: of this kind, in an update.
            updates: that there will be.
        """
        taken = positions / max(1, positions // _POSITIONS)
        return updates // 2 * taken >= _POSITIONS_PER_INPUT * (self.warped_inputs + kept + 1)

    def update(self, warped: Tensor, true: Tensor, shown: Tensor, mirrored: Tensor) -> None:
        """Takes in a batch.

        Args:
            warped: normalized features of base views, warped, float32 `(B, C, h, w)`.
            true: those of their views.
            shown: bool `(B, h, w)`, where the view shows something of its base view.
            mirrored: bool `(B,)`.
        """
        half, self._batches = self._batches % 2, self._batches + 1
        for kind in (0, 1):
            rows = mirrored == bool(kind)
            around = F.unfold(_padded(warped[rows], self.side), self.side).unflatten(2, warped.shape[2:])
            values = torch.cat([around, true[rows]], 1).movedim(1, -1)[shown[rows]]
            values = values[:: max(1, len(values) // _POSITIONS)]
            values = torch.cat([values, values.new_ones(len(values), 1)], 1)
            self._products[half, kind] += (values.T @ values).cpu().double()

    def solve(self, kept: Tensor) -> Tensor | None:
        """The maps for normalized features.

        Args:
            kept: int64 `(K,)`, the channels that are kept of every view.

        Returns:
            float64 `(2, N * C + K + 1, C)`, for views that are not mirrored and those that are: the weights of warped
            channels (each with its N neighbours, itself included), of kept channels and of one. A channel that its
            map would not bring nearer is only warped. None if no channel gains.
        """
        channels, warped = self.channels, self.warped_inputs
        inputs = torch.cat([torch.arange(warped), warped + kept, torch.tensor([warped + channels])])
        targets = warped + torch.arange(channels)
        warp_alone = torch.zeros(len(inputs), channels, dtype=torch.float64)
        middle = self.side**2 // 2
        warp_alone[torch.arange(channels) * self.side**2 + middle, torch.arange(channels)] = 1
        maps, gains = [], False
        for kind in (0, 1):
            halves = self._products[:, kind]
            if (halves[:, -1, -1] < _POSITIONS_PER_INPUT * len(inputs)).any():
                maps.append(warp_alone)
                continue
            errors = torch.zeros(2, channels, dtype=torch.float64)
            for fitted, judge in ((0, 1), (1, 0)):
                own = _ridge(halves[fitted], inputs, targets)
                errors += torch.stack([_error(halves[judge], inputs, targets, each) for each in (own, warp_alone)])
            better = errors[0] < errors[1]
            # What is kept is not made.
            better[kept] = False
            gains |= bool(better.any())
            maps.append(torch.where(better, _ridge(halves.sum(0), inputs, targets), warp_alone))
        return torch.stack(maps) if gains else None


def denormalized(maps: Tensor, kept: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """The maps for features as they are.

    Args:
        maps: what `ChannelMapFit.solve` returned.
        kept: the channels that it was solved for.
        mean, deviation: `(C,)`, by which the features were normalized.

    Returns:
        float32, of the same shape.
    """
    mean, deviation = mean.double(), deviation.double()
    neighbours = (maps.shape[1] - len(kept) - 1) // len(mean)
    input_mean, input_deviation = (
        torch.cat([value.repeat_interleave(neighbours), value[kept]]) for value in (mean, deviation)
    )
    weights = maps[:, :-1] / input_deviation[:, None] * deviation
    constant = mean + deviation * maps[:, -1:] - input_mean[None, None] @ weights
    return torch.cat([weights, constant], 1).float()


def apply_channel_map(maps: Tensor, warped: Tensor, kept: Tensor | None, mirrored: Tensor, limits: Tensor) -> Tensor:
    """Features of views from those of their base views.

    Args:
        maps: float32 `(2, N * C + K + 1, C)`.
        warped: features of the base views, warped, `(B, C, h, w)`.
        kept: the views' own sensitive channels, `(B, K, h, w)`; None if there are none.
        mirrored: bool `(B,)`.
        limits: float32 `(2, C)`, the smallest and the largest value that a channel may have.

    Returns:
        `(B, C, h, w)`, of the dtype of the features.
    """
    channels, own = warped.shape[1], 0 if kept is None else kept.shape[1]
    side = round(((maps.shape[1] - own - 1) // channels) ** 0.5)
    made = torch.empty(warped.shape, dtype=torch.float32, device=warped.device)
    for kind in (0, 1):
        rows = (mirrored == bool(kind)).nonzero().squeeze(1)
        if len(rows) == 0:
            continue
        weights, constant = maps[kind, :-1].T, maps[kind, -1]
        around = weights[:, : weights.shape[1] - own].reshape(channels, channels, side, side)
        values = F.conv2d(_padded(warped[rows].float(), side), around, constant)
        if own:
            values += F.conv2d(kept[rows].float(), weights[:, -own:, None, None])
        made[rows] = values
    low, high = limits[:, :, None, None]
    return torch.minimum(torch.maximum(made, low), high).to(warped.dtype)


def _padded(maps: Tensor, side: int) -> Tensor:
    return F.pad(maps, (side // 2,) * 4, mode="replicate") if side > 1 else maps


def _ridge(products: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    square = products[inputs][:, inputs]
    square = square + _RIDGE * square.diagonal().mean() * torch.eye(len(inputs), dtype=torch.float64)
    return torch.linalg.solve(square, products[inputs][:, targets])


def _error(products: Tensor, inputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Sum over positions of the squared error of every target."""
    square, cross = products[inputs][:, inputs], products[inputs][:, targets]
    own = products.diagonal()[targets]
    return own - 2 * (weights * cross).sum(0) + (weights * (square @ weights)).sum(0)
