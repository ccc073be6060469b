"""Channel maps: linear maps that compute the channels of a view from the warped channels of its base view.

In a mirrored image, a filter for right edges responds where a filter for left edges did before. So the features of a
mirrored view are not the mirrored features, channel by channel, but nearly a linear map of them. One map is fitted for
mirrored views and one for the others, by ridge regression on the same sample from which the channels' similarity is
measured. The inputs are all warped channels and the sensitive channels, which are stored for every view. Where it is
affordable, the neighbours of a position are inputs too: warping interpolates between positions, which blurs, and the
neighbours undo that.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Ridge: this share of the inputs' mean square is added to each input, so that inputs that hardly vary get no weight.
_RIDGE = 1e-3
# A map is fitted only if there are at least this many positions per unknown.
_POSITIONS_PER_INPUT = 4
# Number of positions of a batch that are used; more would take time and change nothing.
_POSITIONS = 2048
# The neighbours are inputs only if there are at most this many inputs.
_MOST_INPUTS = 2048


class ChannelMapFit:
    """Accumulates the data for channel maps in two halves; a map fitted to one half is judged on the other.

    Args:
        channels: number of channels.
        grid: `(h, w)`, the feature grid.

    Attributes:
        warped_inputs: number of inputs that come from warped channels, neighbours included.
    """

    def __init__(self, channels: int, grid: tuple[int, int]):
        self.channels = channels
        self.side = 3 if min(grid) > 1 and 9 * channels <= _MOST_INPUTS else 1
        self.warped_inputs = channels * self.side**2
        size = self.warped_inputs + channels + 1
        # (half, mirrored or not, inputs, inputs); the inputs are warped channels, true channels and one.
        self._products = torch.zeros(2, 2, size, size, dtype=torch.float64)
        self._batches = 0

    def will_fit(self, sensitive: int, positions: float, updates: int) -> bool:
        """Whether there will be enough data to fit a map for one kind of views, the mirrored ones or the others.

        Args:
            sensitive: number of channels that are stored for every view.
            positions: number of positions of views of this kind in one update.
            updates: number of updates.
        """
        used = positions / max(1, positions // _POSITIONS)
        return updates // 2 * used >= _POSITIONS_PER_INPUT * (self.warped_inputs + sensitive + 1)

    def update(self, warped: Tensor, true: Tensor, shown: Tensor, mirrored: Tensor) -> None:
        """Adds a batch.

        Args:
            warped: warped normalized features of base views, float32 `(B, C, h, w)`.
            true: normalized features of their views, of the same shape.
            shown: bool `(B, h, w)`, where a view shows something of its base view.
            mirrored: bool `(B,)`, whether a view is mirrored.

        Shapes: B views, C channels, (h, w) the feature grid.
        """
        half, self._batches = self._batches % 2, self._batches + 1
        for kind in (0, 1):
            rows = mirrored == bool(kind)
            around = F.unfold(_padded(warped[rows], self.side), self.side).unflatten(2, warped.shape[2:])
            values = torch.cat([around, true[rows]], 1).movedim(1, -1)[shown[rows]]
            values = values[:: max(1, len(values) // _POSITIONS)]
            values = torch.cat([values, values.new_ones(len(values), 1)], 1)
            self._products[half, kind] += (values.T @ values).cpu().double()

    def solve(self, sensitive: Tensor) -> Tensor | None:
        """Fits the channel maps for normalized features.

        Args:
            sensitive: int64 `(K,)`, the channels that are stored for every view.

        Returns:
            float64 `(2, N * C + K + 1, C)`: a map for views that are not mirrored and one for mirrored views. A map
            holds the weights of the warped channels (each with its N neighbouring positions, itself included), of the
            sensitive channels, and a constant. For a channel whose error it would not lower, it only copies the warped
            channel. None if it lowers the error of no channel.

        Shapes: C channels, K of them sensitive, N neighbouring positions.
        """
        channels, warped = self.channels, self.warped_inputs
        inputs = torch.cat([torch.arange(warped), warped + sensitive, torch.tensor([warped + channels])])
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
            for fit, judge in ((0, 1), (1, 0)):
                weights = _ridge(halves[fit], inputs, targets)
                errors += torch.stack([_error(halves[judge], inputs, targets, each) for each in (weights, warp_alone)])
            better = errors[0] < errors[1]
            # Sensitive channels are stored, not computed.
            better[sensitive] = False
            gains |= bool(better.any())
            maps.append(torch.where(better, _ridge(halves.sum(0), inputs, targets), warp_alone))
        return torch.stack(maps) if gains else None


def denormalized(channel_maps: Tensor, sensitive: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Turns channel maps for normalized features into maps for the features themselves.

    Args:
        channel_maps: what `ChannelMapFit.solve` returned, float64 `(2, N * C + K + 1, C)`.
        sensitive: the channels that were passed to it, int64 `(K,)`.
        mean, deviation: `(C,)`, by which the features were normalized.

    Returns:
        float32 `(2, N * C + K + 1, C)`.

    Shapes: C channels, K of them sensitive, N neighbouring positions.
    """
    mean, deviation = mean.double(), deviation.double()
    neighbours = (channel_maps.shape[1] - len(sensitive) - 1) // len(mean)
    input_mean, input_deviation = (
        torch.cat([value.repeat_interleave(neighbours), value[sensitive]]) for value in (mean, deviation)
    )
    weights = channel_maps[:, :-1] / input_deviation[:, None] * deviation
    constant = mean + deviation * channel_maps[:, -1:] - input_mean[None, None] @ weights
    return torch.cat([weights, constant], 1).float()


def apply_channel_map(
    channel_maps: Tensor, warped: Tensor, sensitive: Tensor | None, mirrored: Tensor, limits: Tensor
) -> Tensor:
    """Computes the features of views from the warped features of their base views.

    Args:
        channel_maps: float32 `(2, N * C + K + 1, C)`, for views that are not mirrored and for mirrored views.
        warped: warped features of the base views, `(B, C, h, w)`.
        sensitive: sensitive channels of the views, `(B, K, h, w)`; None if there are none.
        mirrored: bool `(B,)`, whether a view is mirrored.
        limits: float32 `(2, C)`, smallest and largest value of a channel in the result.

    Returns:
        `(B, C, h, w)`, of the dtype of the features.

    Shapes: B views, C channels, K of them sensitive, N neighbouring positions, (h, w) the feature grid.
    """
    channels, stored = warped.shape[1], 0 if sensitive is None else sensitive.shape[1]
    side = round(((channel_maps.shape[1] - stored - 1) // channels) ** 0.5)
    features = torch.empty(warped.shape, dtype=torch.float32, device=warped.device)
    for kind in (0, 1):
        rows = (mirrored == bool(kind)).nonzero().squeeze(1)
        if len(rows) == 0:
            continue
        weights, constant = channel_maps[kind, :-1].T, channel_maps[kind, -1]
        around = weights[:, : weights.shape[1] - stored].reshape(channels, channels, side, side)
        values = F.conv2d(_padded(warped[rows].float(), side), around, constant)
        if sensitive is not None and stored:
            values += F.conv2d(sensitive[rows].float(), weights[:, -stored:, None, None])
        features[rows] = values
    low, high = limits[:, :, None, None]
    return torch.minimum(torch.maximum(features, low), high).to(warped.dtype)


def _padded(features: Tensor, side: int) -> Tensor:
    return F.pad(features, (side // 2,) * 4, mode="replicate") if side > 1 else features


def _ridge(products: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """Weights `(inputs, targets)` of a ridge regression, from the products of all inputs."""
    square = products[inputs][:, inputs]
    square = square + _RIDGE * square.diagonal().mean() * torch.eye(len(inputs), dtype=torch.float64)
    return torch.linalg.solve(square, products[inputs][:, targets])


def _error(products: Tensor, inputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Squared error of every target, summed over the positions."""
    square, cross = products[inputs][:, inputs], products[inputs][:, targets]
    squares = products.diagonal()[targets]
    return squares - 2 * (weights * cross).sum(0) + (weights * (square @ weights)).sum(0)
