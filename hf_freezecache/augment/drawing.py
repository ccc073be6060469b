"""How one view of a sample is drawn: by a pipeline of images, or by a function of rows."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import PIL.Image
import torch
from torch import nn
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F
from transformers.utils import logging

from ..rng import preserve_rng, seed_rng
from .coordinate_grid import GridRefusedError, make_grid, read_grid
from .following import follow

logger = logging.get_logger(__name__)

PIXELS = "pixel_values"
_CAST = "scale it to 8 bits"
_END = "end it with v2.ToImage(), v2.ToDtype(torch.float32, scale=True)"


@dataclass(frozen=True)
class Drawn:
    """What was drawn for a sample.

    Args:
        output: of the transform: the pixels, or columns of one row.
        pixels: the view `(C, H, W)`; None if a function of rows returned no such tensor or array.
        points: the point of the image that each of its pixels shows, see `read_grid`; None if they were not requested
            or are not known.
        refused: why they are not known.

    Shapes: C channels, H x W pixels.
    """

    output: Any
    pixels: torch.Tensor | None
    points: torch.Tensor | None = None
    refused: str | None = None

    def need_points(self) -> torch.Tensor:
        """The points.

        Raises:
            GridRefusedError: if they are not known.
        """
        if self.points is None:
            raise GridRefusedError(str(self.refused))
        return self.points


class Drawer(Protocol):
    """Draws the samples of one kind of transform."""

    is_followed: bool

    def split(self, rows: Mapping[str, Any]) -> list[Any]:
        """The samples of some rows."""

    def join(self, outputs: list[Any], rows: Mapping[str, Any]) -> dict[str, Any]:
        """The columns that the transform returns, from what was drawn for each sample."""

    def size(self, sample: Any) -> tuple[int, int]:
        """Height and width of a sample's image."""

    def draw(self, name: str, sample: Any, key: tuple | None = None) -> Drawn:
        """Draws a view.

        Args:
            name: `train` or `base`.
            sample: as `split` returned it.
            key: seed of the draw, with which the generators are seeded; None: no points are requested.
        """


class ImageDrawer:
    """Draws with v2 pipelines that take an image.

    Args:
        train, base: the pipelines.
        column: of the images.
    """

    is_followed = False

    def __init__(self, train: Callable, base: Callable, column: str):
        self._pipelines, self._column = {"train": train, "base": base}, column

    def split(self, rows: Mapping[str, Any]) -> list[Any]:
        return [to_rgb(image) for image in rows[self._column]]

    def join(self, outputs: list[Any], rows: Mapping[str, Any]) -> dict[str, Any]:
        others = {name: values for name, values in rows.items() if name != self._column}
        return {**others, PIXELS: outputs}

    def size(self, sample: Any) -> tuple[int, int]:
        height, width = F.get_size(sample)
        return height, width

    def draw(self, name: str, sample: Any, key: tuple | None = None) -> Drawn:
        pipeline = self._pipelines[name]
        pixels = check_pixels(pipeline(sample), name)
        if key is None:
            return Drawn(pixels, pixels)
        try:
            return Drawn(pixels, pixels, _draw_grid(pipeline, sample, pixels, key, name))
        except GridRefusedError as error:
            return Drawn(pixels, pixels, refused=str(error))


class RowDrawer:
    """Draws with functions of rows; the geometry of a view is found by following its calls.

    Args:
        train, base: the functions.
        column: of the images.
    """

    is_followed = True

    def __init__(self, train: Callable, base: Callable, column: str):
        self._functions, self._column = {"train": train, "base": base}, column

    def split(self, rows: Mapping[str, Any]) -> list[Any]:
        return [
            {name: values[place : place + 1] for name, values in rows.items()}
            for place in range(len(rows[self._column]))
        ]

    def join(self, outputs: list[Any], rows: Mapping[str, Any]) -> dict[str, Any]:
        return {name: [output[name] for output in outputs] for name in outputs[0]} if outputs else dict(rows)

    def size(self, sample: Any) -> tuple[int, int]:
        return _image_size(sample[self._column][0])

    def draw(self, name: str, sample: Any, key: tuple | None = None) -> Drawn:
        row = {column: values[:] for column, values in sample.items()}
        if key is None:
            output = _only_row(self._functions[name](row), name)
            return Drawn(output, _as_pixels(output[PIXELS]))
        size = self.size(sample)
        with follow(sample[self._column][0], make_grid(*size)) as followed:
            output = _only_row(self._functions[name](row), name)
        pixels = _as_pixels(output[PIXELS])
        if pixels is None:
            return Drawn(output, None, refused=f"the {name} function returns no tensors (C, H, W) as '{PIXELS}'")
        try:
            points = read_grid(followed.grid_of(output[PIXELS]), pixels.shape[1:], size, name)
        except GridRefusedError as error:
            return Drawn(output, pixels, refused=f"the {name} function cannot be followed: {error}")
        return Drawn(output, pixels, points)


def make_drawer(train: Callable, base: Callable, column: str, rows: Mapping[str, Any]) -> Drawer:
    """The drawer for two callables of the same kind, which a row tells.

    Args:
        train, base: the callables.
        column: of the images.
        rows: columns of some rows; the first row is drawn.

    Raises:
        ValueError: if a callable takes neither rows nor images, or each another kind.
    """
    takes_rows = [_takes_rows(function, name, column, rows) for name, function in (("train", train), ("base", base))]
    if takes_rows[0] != takes_rows[1]:
        kinds = ["a function of rows" if kind else "a pipeline that takes an image" for kind in takes_rows]
        raise ValueError(
            f"ReplayableTransform: `train` is {kinds[0]} and `base` is {kinds[1]}: give two of the same kind."
        )
    return (RowDrawer if takes_rows[0] else ImageDrawer)(train, base, column)


def _takes_rows(function: Callable, name: str, column: str, rows: Mapping[str, Any]) -> bool:
    if isinstance(function, (nn.Module, v1.Compose)):  # a dict of images would pass through v2 pipelines
        return False
    row = {key: values[:1] for key, values in rows.items()}
    with preserve_rng():
        try:
            output = function(row)
        except Exception as of_rows:  # whatever a function of images raises for a dict
            try:
                function(to_rgb(rows[column][0]))
            except Exception as of_images:
                raise ValueError(
                    f"ReplayableTransform: `{name}` takes neither a dict of columns ({type(of_rows).__name__}: "
                    f"{of_rows}) nor an image ({type(of_images).__name__}: {of_images})."
                ) from of_rows
            logger.debug("`%s` takes an image, not a dict of columns", name, exc_info=of_rows)
            return False
    return isinstance(output, Mapping) and PIXELS in output


def _only_row(output: Any, name: str) -> dict[str, Any]:
    """The columns of the one row that a function of rows returned.

    Raises:
        ValueError: if it returned another number of rows.
    """
    if not isinstance(output, Mapping) or PIXELS not in output:
        raise ValueError(f"the {name} function must return a dict of columns with '{PIXELS}' for every row")
    counts = {column: len(values) for column, values in output.items()}
    if set(counts.values()) != {1}:
        raise ValueError(f"the {name} function must return one row for each row, got {counts} values for one")
    return {column: values[0] for column, values in output.items()}


def _as_pixels(value: Any) -> torch.Tensor | None:
    if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim == 3:
        return torch.as_tensor(value).as_subclass(torch.Tensor)
    return None


def _image_size(image: Any) -> tuple[int, int]:
    if isinstance(image, PIL.Image.Image):
        return image.height, image.width
    if isinstance(image, torch.Tensor) and image.ndim == 3:
        return image.shape[1], image.shape[2]
    if isinstance(image, np.ndarray) and image.ndim in (2, 3):
        return image.shape[0], image.shape[1]
    return 1, 1  # of an unknown kind: no followed call returns it


def to_rgb(image: Any) -> PIL.Image.Image | tv_tensors.Image:
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


def check_pixels(pixels: Any, name: str) -> torch.Tensor:
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
        GridRefusedError: if the pipeline does not give the points.

    Shapes: H x W pixels of the view.
    """
    state = generator_states()
    seed_rng(*key)
    height, width = F.get_size(image)
    with warnings.catch_warnings():
        # RandomErasing warns about all masks, also about those that it does erase.
        warnings.filterwarnings("ignore", message=".*is currently passing through inputs of type")
        try:
            outputs = pipeline(image, make_grid(height, width))
        except Exception as error:  # the image alone caused no error, so the grid did
            reason = str(error).partition("\n")[0]
            logger.debug("The %s pipeline does not take an image with a mask", name, exc_info=error)
            raise GridRefusedError(
                f"the {name} pipeline does not take an image with a mask: {type(error).__name__}: {reason}"
            ) from error
    if not isinstance(outputs, (tuple, list)) or len(outputs) != 2:
        raise GridRefusedError(f"the {name} pipeline does not return an image with its mask")
    again, grid = outputs
    if generator_states() != state or not torch.equal(again, pixels):
        raise GridRefusedError(f"the {name} pipeline draws other random numbers for an image with a mask than alone")
    return read_grid(grid, pixels.shape[1:], (height, width), name)


def generator_states() -> tuple:
    """States of the global generators from which pipelines draw, for comparison."""
    numpy_state = np.random.get_state(legacy=False)
    keys = numpy_state["state"]["key"].tobytes()
    others = numpy_state["state"]["pos"], numpy_state["has_gauss"], numpy_state["gauss"]
    return random.getstate(), keys, others, torch.get_rng_state().numpy().tobytes()
