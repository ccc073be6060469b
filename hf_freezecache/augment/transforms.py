"""Augmentation that can be repeated: the same view of the same sample again, and the geometry of the view.

A torchvision v2 pipeline transforms an image and its masks with one draw. For a mask that holds the coordinates of
every pixel, it returns, for every pixel of the view, the coordinates of the point that this pixel shows.
"""

from __future__ import annotations

import random
import textwrap
import warnings
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import PIL.Image
import torch
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ..rng import preserve_rng, seed_rng
from .draws import Draw, current_draw
from .geometry import cell_centres, encode_geometry, fit_affine, map_points

# Third channel of a coordinate grid: a value that no image holds, so that a transform that treats the grid as an image
# is detected.
_MARKER = 65536.0
# Interpolation errs along borders by half a pixel of the image plus half a pixel of the view; this adds a margin.
_BORDER_ERROR = 0.6
# Number of image sizes for which the map to the base view is cached, a few hundred bytes each.
_SIZES = 1024
_ROUGHLY = 1e-5
_CAST = "scale it to 8 bits"
_END = "end it with v2.ToImage(), v2.ToDtype(torch.float32, scale=True)"


class CoordinateGrid(tv_tensors.Mask):
    """The coordinates of an image's pixels as a mask, float32 `(3, H, W)`: x + 1, y + 1 and a constant marker.

    Transforms interpolate the three channels linearly and fill them with zeros outside the image, whatever value they
    fill images with. So the first two channels divided by the third are coordinates, up to half a pixel outside the
    image's border. A plain mask would not do: it gets the nearest pixel, which is half a pixel of the view off on
    average, cannot be padded with colours, and is not erased by `RandomErasing`.

    Shapes: H x W pixels of the image.
    """


class ReplayableTransform:
    """A transform for `dataset.with_transform` that draws training images so that each draw can be repeated.

    It replaces the image column by `pixel_values` and passes on the other columns. Outside a trainer with a feature
    cache it draws as the pipeline does. While such a trainer fetches rows, a draw depends on the seed of the training,
    the sample and the epoch (or the number of the view), but not on batches, workers or earlier draws. Random numbers
    come from the global generators of Python, NumPy and torch.

    Args:
        train: v2 pipeline with the augmentation, `v2.Compose([...])`. It takes a PIL image in RGB or a
            `tv_tensors.Image` of 3 channels and ends in a tensor `(C, H, W)`.
        base: the pipeline for the base view, without random transforms, as for evaluation: it resizes and crops, then
            changes colours. The part of the image that it shows may depend on the size of the image only.
        image_column: column of the images: PIL images of 8 or 16 bits a channel, or tensors `(C, H, W)` with 1, 3 or 4
            channels: uint8, uint16 or floats. 16 bits become 8; floats reach the pipelines as they are.

    Raises:
        ValueError: when called, if there is no image column, if `base` draws random numbers, or if a pipeline does
            not end in a tensor.
        TypeError: when called, if an image is neither of these.

    Shapes: C channels, H x W pixels.
    """

    def __init__(self, train: Callable, base: Callable, image_column: str = "image"):
        self.train, self.base, self.image_column = train, base, image_column
        self._to_base: dict[tuple[int, int], torch.Tensor | str] = {}

    def __repr__(self) -> str:
        pipelines = f"train={self.train!r},\nbase={self.base!r},\nimage_column={self.image_column!r},"
        return f"{type(self).__name__}(\n{textwrap.indent(pipelines, '    ')}\n)"

    def __getstate__(self) -> dict[str, Any]:
        # Without the cached maps: a transform that was used has the same hash as a new one.
        return {"train": self.train, "base": self.base, "image_column": self.image_column}

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).__init__(self, **state)

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        """Draws an image for each row.

        Args:
            rows: column name -> values.

        Returns:
            The same columns, the image column replaced by `pixel_values`, tensors `(C, H, W)`.

        Raises:
            ValueError, TypeError: see the class.
        """
        if self.image_column not in rows:
            raise ValueError(
                f"no image column {self.image_column!r} among {sorted(rows)}: set remove_unused_columns=False in "
                "TrainingArguments (a Trainer drops columns that the model does not take), or name the column with "
                "ReplayableTransform(..., image_column=...)"
            )
        images = [_to_rgb(image) for image in rows[self.image_column]]
        draw = current_draw()
        if draw is None:
            pixels = [_draw(self.train, image, "train") for image in images]
        else:
            with preserve_rng():
                pixels = [self._draw_sample(image, draw) for image in images]
        others = {name: values for name, values in rows.items() if name != self.image_column}
        return {**others, "pixel_values": pixels}

    def _draw_sample(self, image: Any, draw: Draw) -> torch.Tensor:
        key = draw.key(draw.take())
        seed_rng(*key)
        if draw.view == 0:
            return self._draw_base(image)
        pixels = _draw(self.train, image, "train")
        if draw.geometry is None or draw.refused is not None:
            return pixels
        kind, grid = draw.geometry
        try:
            points, tolerance = self._find_points(image, pixels, key)
        except _GridRefusedError as error:
            draw.refused = str(error)
        else:
            draw.geometries.append(encode_geometry(points, kind, grid, tolerance))
        return pixels

    def _find_points(self, image: Any, pixels: torch.Tensor, key: tuple) -> tuple[torch.Tensor, float]:
        """Points and tolerance for `encode_geometry`, for the view that was just drawn.

        Args:
            image: the image.
            pixels: the view; the generators are in the state after its draw.
            key: seed of the draw.

        Raises:
            _GridRefusedError: if the pipeline does not give the geometry.
        """
        points = _draw_grid(self.train, image, pixels, key, "train")
        step = _mean_step(points)
        matrix = self._map_to_base(image)
        # The larger of the two sides of an image's pixel in the base view.
        side = matrix[:2, :2].abs().sum(1).max().item()
        return map_points(matrix.float(), points), max(_BORDER_ERROR * (1 + step) * side, 1e-3)

    def _map_to_base(self, image: Any) -> torch.Tensor:
        """The affine map from the pixels of an image to its base view: float64 `(3, 3)`.

        Raises:
            _GridRefusedError: if the base pipeline is no such map.
        """
        size = tuple(F.get_size(image))
        if size not in self._to_base:
            if len(self._to_base) == _SIZES:
                self._to_base.pop(next(iter(self._to_base)))
            try:
                self._to_base[size] = self._fit_base(image)
            except _GridRefusedError as error:
                self._to_base[size] = str(error)
        matrix = self._to_base[size]
        if isinstance(matrix, str):
            raise _GridRefusedError(matrix)
        return matrix

    def _fit_base(self, image: Any) -> torch.Tensor:
        """Computes `_map_to_base`."""
        key = ("base",)
        seed_rng(*key)
        points = _draw_grid(self.base, image, self._draw_base(image), key, "base")
        tolerance = _BORDER_ERROR * (1 + _mean_step(points))
        places = cell_centres((points.shape[0], points.shape[1]))
        valid = points.isfinite().all(-1)
        advice = "use resizing and cropping there (v2.Resize, v2.CenterCrop, v2.Pad)"
        if not valid.any():
            raise _GridRefusedError(f"the base pipeline shows nothing of an image; {advice}")
        places, points = places[valid].double(), points[valid].double()
        matrix = fit_affine(places, points)
        flat = matrix.det().abs() < 1e-9 and min(F.get_size(image)) > 1
        if flat or (map_points(matrix, places) - points).abs().max() > tolerance:
            raise _GridRefusedError(f"the base pipeline does more than resize and crop; {advice}")
        # For an image one pixel wide, that pixel is mapped to the centre of the base view.
        return torch.linalg.pinv(matrix, rtol=1e-6)

    def _draw_base(self, image: Any) -> torch.Tensor:
        state = _generators()
        pixels = _draw(self.base, image, "base")
        if _generators() != state:
            raise ValueError(
                "`base` draws random numbers, but the base view of an image must be the same in every epoch: remove "
                "its random transforms (v2.Resize and v2.CenterCrop instead of v2.RandomResizedCrop, and so on)"
            )
        return pixels


class _GridRefusedError(Exception):
    """A pipeline does not give the geometry of its views; the message, one line, names the reason."""


def _to_rgb(image: Any) -> PIL.Image.Image | tv_tensors.Image:
    if isinstance(image, PIL.Image.Image):
        return image if image.mode == "RGB" else _to_8_bits(image).convert("RGB")
    if not isinstance(image, torch.Tensor) or image.ndim != 3 or image.shape[0] not in (1, 3, 4):
        got = f"a tensor of shape {tuple(image.shape)}" if isinstance(image, torch.Tensor) else type(image).__name__
        raise TypeError(f"an image is a PIL image or a tensor (C, H, W) with 1, 3 or 4 channels, got {got}")
    if image.dtype == torch.uint16:
        image = _halve(image.to(torch.int32))
    if not image.is_floating_point() and image.dtype != torch.uint8:
        # Pipelines scale by the largest value of the type: 255 of 2 ** 63 would be black.
        raise TypeError(
            f"an image is a tensor of {image.dtype}, whose brightest value is unknown: {_CAST} in the column "
            f"(0 to 255: uint8; 0 to 1: float32)"
        )
    return tv_tensors.Image(image.repeat(3, 1, 1) if image.shape[0] == 1 else image[:3])


def _to_8_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image with 8 bits a channel; PIL's own conversion cuts off what is brighter than 255.

    Raises:
        TypeError: if the image's mode does not tell which value is white, and its values are not from 0 to 255.
    """
    if image.mode.startswith("I;16"):
        values = torch.from_numpy(np.asarray(image).astype(np.int32))
        return PIL.Image.fromarray(_halve(values).numpy())
    if image.mode in ("I", "F"):
        # Annotated for images of several channels too, which these modes do not have.
        low, high = cast(tuple[float, float], image.getextrema())
        if low < 0 or high > 255 or (image.mode == "F" and 0 < high <= 1):
            raise TypeError(
                f"an image of PIL's mode '{image.mode}' has values from {low:.4g} to {high:.4g}: which one is white "
                f"is unknown; {_CAST} before, e.g. PIL.Image.fromarray((values / white * 255).astype('uint8'))"
            )
    return image


def _halve(values: torch.Tensor) -> torch.Tensor:
    """16 bits to 8: 65535 becomes 255."""
    return ((values + 128) // 257).to(torch.uint8)


def _draw(pipeline: Callable, image: Any, name: str) -> torch.Tensor:
    return _check_pixels(pipeline(image), name)


def _check_pixels(pixels: Any, name: str) -> torch.Tensor:
    if not isinstance(pixels, torch.Tensor) or pixels.ndim != 3:
        got = f"shape {tuple(pixels.shape)}" if isinstance(pixels, torch.Tensor) else type(pixels).__name__
        raise ValueError(f"the {name} pipeline must end in a tensor (C, H, W), got {got}; {_END}")
    return pixels.as_subclass(torch.Tensor)


def _draw_grid(pipeline: Callable, image: Any, pixels: torch.Tensor, key: tuple, name: str) -> torch.Tensor:
    """The point of the image that each pixel of a view shows.

    Args:
        pipeline: pipeline that has just drawn the view.
        image: the image.
        pixels: the view.
        key: seed of the draw.
        name: of the pipeline.

    Returns:
        float32 `(H, W, 2)`, x and y in pixels of the image, whose centres are whole numbers; NaN where the view shows
        nothing of the image.

    Raises:
        _GridRefusedError: if the pipeline does not give the points.

    Shapes: H x W pixels of the view.
    """
    state = _generators()
    seed_rng(*key)
    height, width = F.get_size(image)
    with warnings.catch_warnings():
        # RandomErasing warns about all masks, also about those that it does erase.
        warnings.filterwarnings("ignore", message=".*is currently passing through inputs of type")
        try:
            outputs = pipeline(image, _make_grid(height, width))
        except Exception as error:  # the image alone caused no error, so the grid did
            reason = str(error).partition("\n")[0]
            raise _GridRefusedError(
                f"the {name} pipeline does not take an image with a mask: {type(error).__name__}: {reason}"
            ) from error
    if not isinstance(outputs, (tuple, list)) or len(outputs) != 2:
        raise _GridRefusedError(f"the {name} pipeline does not return an image with its mask")
    again, grid = outputs
    if _generators() != state or not torch.equal(again, pixels):
        raise _GridRefusedError(f"the {name} pipeline draws other random numbers for an image with a mask than alone")
    return _read_grid(grid, pixels.shape[1:], (height, width), name)


def _make_grid(height: int, width: int) -> CoordinateGrid:
    grid = torch.empty(3, height, width)
    grid[0] = torch.arange(1, width + 1)
    grid[1] = torch.arange(1, height + 1)[:, None]
    grid[2] = _MARKER
    return CoordinateGrid(grid)


def _read_grid(grid: Any, shape: tuple, size: tuple[int, int], name: str) -> torch.Tensor:
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
        raise _GridRefusedError(
            f"the {name} pipeline changes the type of masks (v2.ToPureTensor is not needed here; say what images "
            "v2.Lambda is for: v2.Lambda(function, PIL.Image.Image, tv_tensors.Image))"
        )
    if grid.shape != (3, *shape):
        raise _GridRefusedError(
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
        raise _GridRefusedError(
            f"the {name} pipeline changes the values of masks (say what images v2.Lambda is for: "
            "v2.Lambda(function, PIL.Image.Image, tv_tensors.Image))"
        )
    points = torch.where(share >= 0.5, grid[:2] / share - 1, torch.nan)
    return points.permute(1, 2, 0)


def _mean_step(points: torch.Tensor) -> float:
    """Mean distance of the points that neighbouring pixels show, the larger of both directions; 0 without points."""
    steps = [torch.hypot(*points.diff(dim=dim).unbind(-1)).nanmean() for dim in (0, 1)]
    return torch.stack(steps).nan_to_num(0).max().item()


def _generators() -> tuple:
    """States of the global generators from which pipelines draw, for comparison."""
    numpy_state = np.random.get_state(legacy=False)
    keys = numpy_state["state"]["key"].tobytes()
    others = numpy_state["state"]["pos"], numpy_state["has_gauss"], numpy_state["gauss"]
    return random.getstate(), keys, others, torch.get_rng_state().numpy().tobytes()


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
