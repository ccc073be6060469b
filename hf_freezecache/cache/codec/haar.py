"""The 2 x 2 Haar transform of features: the sum of four neighbouring positions, and three differences.

Neighbouring positions are similar in most channels: their sum has most of the energy, and the three differences need
few bits. The transform consists of additions and exact halvings, so that a row does not depend on its batch. With a
learned transform (a matrix product) it would.

Shapes: B samples, C channels, H x W positions, Z = H * W / 4 positions in each of the 4 bands.
"""

import torch

from ...model.layout import FeatureLayout

# The sum of four values up to this is finite.
_WIDEST = torch.finfo(torch.float32).max / 4


def band_count(layout: FeatureLayout) -> int:
    """Number of bands: 4 for a grid with even sides; 1, without a transform, for any other layout."""
    return 4 if layout.grid is not None and not any(side % 2 for side in layout.grid) else 1


def to_bands(body: torch.Tensor, layout: FeatureLayout) -> torch.Tensor:
    """Splits features into bands.

    Args:
        body: `(B, H * W, C)`, `(B, C, H, W)` or `(B, C)`, without special tokens.
        layout: layout of the features.

    Returns:
        float32 `(B, bands, C, Z)`, contiguous. The bands are sums, differences along W, along H, and along both. Each
        value is half the signed sum of four values, so that the transform is orthonormal.
    """
    channels, maps = layout.channels, len(layout.shape) == 3
    if band_count(layout) == 1:
        body = body.flatten(2) if maps else body.reshape(len(body), layout.positions, channels).transpose(1, 2)
        return body.to(torch.float32, memory_format=torch.contiguous_format).unsqueeze(1)
    halves = body.to(torch.float32).clamp(-_WIDEST, _WIDEST).mul_(0.5)
    (upper, lower), dim = _rows(halves, layout), -1 if maps else -2
    top, bottom = upper + lower, upper - lower
    bands = torch.empty(4, len(body), *_band_shape(layout), device=body.device)
    for half, first in ((top, 0), (bottom, 2)):
        left, right = half.unflatten(dim, (-1, 2)).unbind(dim)
        torch.add(left, right, out=bands[first])
        torch.sub(left, right, out=bands[first + 1])
    bands = bands.flatten(3) if maps else bands.flatten(2, 3).transpose(2, 3)
    return bands.transpose(0, 1).contiguous()


def from_bands(bands: torch.Tensor, layout: FeatureLayout, out: torch.Tensor) -> None:
    """Joins bands to features: the inverse of `to_bands`.

    Args:
        bands: float32 `(B, 4, C, Z)` for feature maps and `(B, 4, Z, C)` for tokens, already halved; overwritten.
        layout: layout of the features.
        out: float32 `(B, V)` with contiguous rows, V values each; receives the features.
    """
    body = out.unflatten(1, layout.narrowed(layout.channels).shape)
    upper, lower = _rows(body, layout)
    if len(layout.shape) == 3:
        bands = bands.unflatten(3, _half_grid(layout))
        # Complex numbers are stored as pairs: no other operation interleaves two tensors at the speed of memory.
        columns = torch.complex(bands[:, ::2] + bands[:, 1::2], bands[:, ::2] - bands[:, 1::2])
        sums, differences = torch.view_as_real(columns).flatten(-2).unbind(1)
        torch.add(sums, differences, out=upper)
        torch.sub(sums, differences, out=lower)
        return
    bands = bands.unflatten(2, _half_grid(layout))
    top, bottom = bands[:, :2] + bands[:, 2:], bands[:, :2].sub_(bands[:, 2:])
    for half, target in ((top, upper), (bottom, lower)):
        left, right = target.unflatten(-2, (-1, 2)).unbind(-2)
        torch.add(half[:, 0], half[:, 1], out=left)
        torch.sub(half[:, 0], half[:, 1], out=right)


def _half_grid(layout: FeatureLayout) -> tuple[int, int]:
    assert layout.grid is not None  # else there is one band, and no transform
    return layout.grid[0] // 2, layout.grid[1] // 2


def _band_shape(layout: FeatureLayout) -> tuple[int, int, int]:
    if len(layout.shape) == 3:
        return (layout.channels, *_half_grid(layout))
    return (*_half_grid(layout), layout.channels)


def _rows(body: torch.Tensor, layout: FeatureLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """The even and the odd rows of positions, sharing memory: `(B, C, H / 2, W)`, for tokens `(B, H / 2, W, C)`."""
    if len(layout.shape) == 3:
        return body.unflatten(2, (-1, 2)).unbind(3)
    rows, half = _half_grid(layout)
    return body.unflatten(1, (rows, 2, 2 * half)).unbind(2)
