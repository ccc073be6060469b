"""The coordinates of an image's pixels as a mask, which transforms move as they move the image.

For a mask that holds the coordinates of every pixel, a geometric transform returns, for every pixel of the view, the
coordinates of the point that this pixel shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

# Third channel of a coordinate grid: a value that no image holds, so that a transform that treats the grid as an image
# is detected.
_MARKER = 65536.0
_ROUGHLY = 1e-5


class CoordinateGrid(tv_tensors.Mask):
    """The coordinates of an image's pixels as a mask, float32 `(3, H, W)`: x + 1, y + 1 and a constant marker.

    Transforms interpolate the three channels linearly and fill them with zeros outside the image, whatever value they
    fill images with. So the first two channels divided by the third are coordinates, up to half a pixel outside the
    image's border. A plain mask would not do: it gets the nearest pixel, which is half a pixel of the view off on
    average, cannot be padded with colours, and is not erased by `RandomErasing`.

    Shapes: H x W pixels of the image.
    """


class GridRefusedError(Exception):
    """A pipeline does not give the geometry of its views; the message, one line, names the reason."""


def make_grid(height: int, width: int) -> CoordinateGrid:
    grid = torch.empty(3, height, width)
    grid[0] = torch.arange(1, width + 1)
    grid[1] = torch.arange(1, height + 1)[:, None]
    grid[2] = _MARKER
    return CoordinateGrid(grid)


def read_grid(grid: Any, shape: tuple, size: tuple[int, int], name: str) -> torch.Tensor:
    """The points in a grid that a pipeline has returned.

    Args:
        grid: second output of the pipeline.
        shape: `(H, W)` of the view.
        size: `(H, W)` of the image.
        name: of the pipeline.

    Returns:
        See `_draw_grid`.
    """
    if not isinstance(grid, CoordinateGrid) or grid.dtype != torch.float32:
        raise GridRefusedError(
            f"the {name} pipeline changes the type of masks (v2.ToPureTensor is not needed here; say what images "
            "v2.Lambda is for: v2.Lambda(function, PIL.Image.Image, tv_tensors.Image))"
        )
    if grid.shape != (3, *shape):
        raise GridRefusedError(
            f"the {name} pipeline gives masks another size than images: {tuple(grid.shape[1:])}, not {tuple(shape)}"
        )
    grid = grid.as_subclass(torch.Tensor)
    share = grid[2] / _MARKER
    most = grid.new_tensor([size[1], size[0]])[:, None, None]
    slack = 0.01
    # A point on the horizon of a perspective is NaN. It is outside, and every comparison with it is false.
    wrong = (share < -_ROUGHLY).any() | (share > 1 + _ROUGHLY).any()
    wrong |= (grid[:2] < share - slack).any() | (grid[:2] > share * most + slack).any()
    # If every pixel of the view seems to be partly outside, the pipeline has scaled the marker.
    if wrong or _ROUGHLY < share.nan_to_num().max() < 1 - _ROUGHLY:
        raise GridRefusedError(
            f"the {name} pipeline changes the values of masks (say what images v2.Lambda is for: "
            "v2.Lambda(function, PIL.Image.Image, tv_tensors.Image))"
        )
    points = torch.where(share >= 0.5, grid[:2] / share - 1, torch.nan)
    return points.permute(1, 2, 0)


def _interpolate_grid(functional: Callable, image_kernel: Callable) -> None:
    """Registers a kernel that interpolates coordinate grids bilinearly, without antialiasing, and fills with zeros.

    Args:
        functional: function of `v2.functional`.
        image_kernel: its kernel for images.
    """

    @F.register_kernel(functional, CoordinateGrid)
    def kernel(grid: CoordinateGrid, *args: Any, **settings: Any) -> CoordinateGrid:
        settings["interpolation"] = InterpolationMode.BILINEAR
        if "antialias" in settings:
            settings["antialias"] = False
        if "fill" in settings:
            settings["fill"] = None
        return tv_tensors.wrap(image_kernel(grid.as_subclass(torch.Tensor), *args, **settings), like=grid)


for _functional, _image_kernel in (
    (F.resize, F.resize_image),
    (F.resized_crop, F.resized_crop_image),
    (F.affine, F.affine_image),
    (F.rotate, F.rotate_image),
    (F.perspective, F.perspective_image),
    (F.elastic, F.elastic_image),
):
    _interpolate_grid(_functional, _image_kernel)


@F.register_kernel(F.pad, CoordinateGrid)
def _pad_grid(grid: CoordinateGrid, padding: Any, fill: Any = None, padding_mode: str = "constant") -> CoordinateGrid:
    return tv_tensors.wrap(F.pad_mask(grid.as_subclass(torch.Tensor), padding, 0, padding_mode), like=grid)


@F.register_kernel(F.erase, CoordinateGrid)
def _erase_grid(
    grid: CoordinateGrid, i: int, j: int, h: int, w: int, v: torch.Tensor, inplace: bool = False
) -> CoordinateGrid:
    erased = grid.as_subclass(torch.Tensor).clone()
    erased[:, i : i + h, j : j + w] = 0
    return tv_tensors.wrap(erased, like=grid)
