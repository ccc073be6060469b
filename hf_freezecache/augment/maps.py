"""Feature maps: the positions of every channel as an image, without special tokens."""

from __future__ import annotations

import torch

from ..model.layout import FeatureLayout


def to_maps(features: torch.Tensor, layout: FeatureLayout) -> torch.Tensor:
    """Features as one feature map per channel, without special tokens.

    Args:
        features: `(B, *layout.shape)`.
        layout: layout of the features.

    Returns:
        `(B, C, h, w)`, sharing memory with the features.

    Raises:
        ValueError: if the layout has no grid, or the features have another shape.

    Shapes: B samples, C channels, (h, w) the layout's grid.
    """
    grid = check_grid(layout)
    if features.shape[1:] != layout.shape:
        expected = ", ".join(["B", *map(str, layout.shape)])
        raise ValueError(f"expected features of shape ({expected}), got {tuple(features.shape)}")
    if len(layout.shape) == 2:
        return layout.body(features).transpose(1, 2).unflatten(2, grid)
    return features.view(len(features), layout.channels, *grid)


def put_maps(features: torch.Tensor, maps: torch.Tensor, layout: FeatureLayout) -> torch.Tensor:
    """Replaces the positions of features by feature maps, in place; special tokens do not change.

    Args:
        features: `(B, *layout.shape)`; changed in place.
        maps: `(B, C, h, w)`, of any float dtype.
        layout: layout of the features.

    Returns:
        The same features.

    Raises:
        ValueError: if the layout has no grid, or a shape does not fit.

    Shapes: B samples, C channels, (h, w) the layout's grid.
    """
    positions = to_maps(features, layout)
    if maps.shape != positions.shape:
        raise ValueError(f"expected maps of shape {tuple(positions.shape)}, got {tuple(maps.shape)}")
    positions.copy_(maps)
    return features


def check_grid(layout: FeatureLayout) -> tuple[int, int]:
    """Checks that features can be warped.

    Returns:
        The layout's grid, `(h, w)`.

    Raises:
        ValueError: if the layout has no grid.
    """
    if layout.grid is None:
        raise ValueError(
            f"features of shape {layout.shape} have no grid, so nothing in them can be warped: "
            "views of such features are stored whole."
        )
    return layout.grid
