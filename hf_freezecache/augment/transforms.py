"""Augmentation that can be repeated: the same view of the same sample again, and the geometry of the view.

A torchvision v2 pipeline transforms an image and its masks with one draw. For a mask that holds the coordinates of
every pixel, it returns, for every pixel of the view, the coordinates of the point that this pixel shows. A function of
rows takes no mask: its calls of torchvision are followed, and the same calls move the coordinates.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import torch

from ..rng import preserve_rng, seed_rng
from .agreement import GeometryProof
from .coordinate_grid import GridRefusedError
from .drawing import Drawer, Drawn, ImageDrawer, generator_states, make_drawer
from .draws import Draw, current_draw, note_call
from .geometry import cell_centres, encode_geometry, fit_affine, map_points

# Interpolation errs along borders by half a pixel of the image plus half a pixel of the view; this adds a margin.
_BORDER_ERROR = 0.6
# Number of image sizes for which the map to the base view is cached, a few hundred bytes each.
_SIZES = 1024


class ReplayableTransform:
    """A transform for `dataset.with_transform` that draws training images so that each draw can be repeated.

    `train` and `base` are two pipelines of images, or two functions of rows as one gives to `with_transform`. Which of
    the two a callable is, a row tells: torchvision's `Compose` and modules take images; any other callable is called
    with the first row, and is a function of rows if it returns a dict with `pixel_values`. No random number is spent
    on that.

    Pipelines: the image column is replaced by `pixel_values`, the other columns are passed on. Functions of rows: what
    they return is returned. Outside a trainer with a feature cache it draws as they do. While such a trainer fetches
    rows, a draw depends on the seed of the training, the sample and the epoch (or the number of the view), but not on
    batches, workers or earlier draws. Random numbers come from the global generators of Python, NumPy and torch.

    A function of rows gets one row at a time then. One that combines rows (mixes their images, standardizes over them)
    would have nothing to combine: a trainer finds such functions at its start, see `find_combined`, gives them whole
    batches as `with_transform` does, and caches nothing.

    The geometry of a function's views is found by following its calls of torchvision (first or second version), and
    proved on the first views of a process, whose pixels are compared with the base view moved by the geometry. A
    function that does something else to an image between these calls has no geometry: whole draws are stored.

    Args:
        train: v2 pipeline with the augmentation, `v2.Compose([...])`. It takes a PIL image in RGB or a
            `tv_tensors.Image` of 3 channels and ends in a tensor `(C, H, W)`. Or a function that takes a dict of
            columns and returns one with `pixel_values`, one row for each row.
        base: the pipeline or function for the base view, without random transforms, as for evaluation: it resizes and
            crops, then changes colours. The part of the image that it shows may depend on the size of the image only.
        image_column: column of the images: PIL images of 8 or 16 bits a channel, or tensors `(C, H, W)` with 1, 3 or 4
            channels: uint8, uint16 or floats. 16 bits become 8; floats reach the pipelines as they are. A function of
            rows gets its rows as they are.

    Raises:
        ValueError: when called, if there is no image column, if `base` draws random numbers, if a pipeline does not
            end in a tensor, if a function returns another number of rows, or if the two are not of the same kind.
        TypeError: when called, if an image is neither of these.

    Shapes: C channels, H x W pixels.
    """

    def __init__(self, train: Callable, base: Callable, image_column: str = "image"):
        self.train, self.base, self.image_column = train, base, image_column
        self._drawer: Drawer | None = None
        self._proof = GeometryProof()
        self._to_base: dict[tuple[int, int], torch.Tensor | str] = {}

    def __repr__(self) -> str:
        pipelines = f"train={self.train!r},\nbase={self.base!r},\nimage_column={self.image_column!r},"
        return f"{type(self).__name__}(\n{textwrap.indent(pipelines, '    ')}\n)"

    def __getstate__(self) -> dict[str, Any]:
        # Without the cached maps: a transform that was used has the same hash as a new one.
        return {"train": self.train, "base": self.base, "image_column": self.image_column}

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).__init__(self, **state)

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        """Draws an image for each row.

        Args:
            rows: column name -> values.

        Returns:
            Of pipelines, the same columns, the image column replaced by `pixel_values`, tensors `(C, H, W)`; of
            functions of rows, what they return.

        Raises:
            ValueError, TypeError: see the class.
        """
        if self.image_column not in rows:
            raise ValueError(
                f"no image column {self.image_column!r} among {sorted(rows)}: set remove_unused_columns=False in "
                "TrainingArguments (a Trainer drops columns that the model does not take), or name the column with "
                "ReplayableTransform(..., image_column=...)"
            )
        drawer = self._drawer_for(rows)
        if drawer.is_followed:
            note_call({"train": self.train, "base": self.base}, self.image_column, rows)
        draw = current_draw()
        if drawer.is_followed and draw is not None and draw.together:
            for _ in rows[self.image_column]:
                draw.take()
            return self.train(rows)
        if draw is None:
            if drawer.is_followed:
                return self.train(rows)
            outputs = [drawer.draw("train", sample).output for sample in drawer.split(rows)]
        else:
            with preserve_rng():
                outputs = [self._draw_sample(drawer, sample, draw) for sample in drawer.split(rows)]
        return drawer.join(outputs, rows)

    def _drawer_for(self, rows: dict[str, Any]) -> Drawer:
        if self._drawer is None:
            if not len(rows[self.image_column]):  # tells nothing about the callables
                return ImageDrawer(self.train, self.base, self.image_column)
            self._drawer = make_drawer(self.train, self.base, self.image_column, rows)
            self._proof = GeometryProof(is_trusted=not self._drawer.is_followed)
        return self._drawer

    def _draw_sample(self, drawer: Drawer, sample: Any, draw: Draw) -> Any:
        key = draw.key(draw.take())
        seed_rng(*key)
        if draw.view == 0:
            return self._draw_base(drawer, sample).output
        if draw.geometry is None or draw.refused is not None:
            return drawer.draw("train", sample).output
        kind, grid = draw.geometry
        drawn = drawer.draw("train", sample, key)
        try:
            points, tolerance = self._find_points(drawer, sample, drawn)
        except GridRefusedError as error:
            draw.refused = str(error)
        else:
            draw.geometries.append(encode_geometry(points, kind, grid, tolerance))
        return drawn.output

    def _find_points(self, drawer: Drawer, sample: Any, drawn: Drawn) -> tuple[torch.Tensor, float]:
        """Points and tolerance for `encode_geometry`.

        Args:
            drawer: has drawn the view.
            sample: the sample.
            drawn: the view.

        Raises:
            GridRefusedError: if the transform does not give the geometry, or it is not that of the view.
        """
        points = drawn.need_points()
        step = _mean_step(points)
        matrix = self._map_to_base(drawer, sample)
        # The larger of the two sides of an image's pixel in the base view.
        side = matrix[:2, :2].abs().sum(1).max().item()
        points = map_points(matrix.float(), points)
        if self._proof.wants_more:
            base = self._draw_base(drawer, sample).pixels
            assert base is not None and drawn.pixels is not None  # they have geometries
            self._proof.add(drawn.pixels, base, points)
        if self._proof.refused is not None:
            raise GridRefusedError(self._proof.refused)
        return points, max(_BORDER_ERROR * (1 + step) * side, 1e-3)

    def _map_to_base(self, drawer: Drawer, sample: Any) -> torch.Tensor:
        """The affine map from the pixels of an image to its base view: float64 `(3, 3)`.

        Raises:
            GridRefusedError: if the base pipeline is no such map.
        """
        size = drawer.size(sample)
        if size not in self._to_base:
            if len(self._to_base) == _SIZES:
                self._to_base.pop(next(iter(self._to_base)))
            try:
                self._to_base[size] = self._fit_base(drawer, sample)
            except GridRefusedError as error:
                self._to_base[size] = str(error)
        matrix = self._to_base[size]
        if isinstance(matrix, str):
            raise GridRefusedError(matrix)
        return matrix

    def _fit_base(self, drawer: Drawer, sample: Any) -> torch.Tensor:
        """Computes `_map_to_base`."""
        key = ("base",)
        seed_rng(*key)
        points = self._draw_base(drawer, sample, key).need_points()
        tolerance = _BORDER_ERROR * (1 + _mean_step(points))
        places = cell_centres((points.shape[0], points.shape[1]))
        valid = points.isfinite().all(-1)
        advice = "use resizing and cropping there (v2.Resize, v2.CenterCrop, v2.Pad)"
        if not valid.any():
            raise GridRefusedError(f"the base pipeline shows nothing of an image; {advice}")
        places, points = places[valid].double(), points[valid].double()
        matrix = fit_affine(places, points)
        flat = matrix.det().abs() < 1e-9 and min(drawer.size(sample)) > 1
        if flat or (map_points(matrix, places) - points).abs().max() > tolerance:
            raise GridRefusedError(f"the base pipeline does more than resize and crop; {advice}")
        # For an image one pixel wide, that pixel is mapped to the centre of the base view.
        return torch.linalg.pinv(matrix, rtol=1e-6)

    def _draw_base(self, drawer: Drawer, sample: Any, key: tuple | None = None) -> Drawn:
        state = generator_states()
        drawn = drawer.draw("base", sample, key)
        if generator_states() != state:
            raise ValueError(
                "`base` draws random numbers, but the base view of an image must be the same in every epoch: remove "
                "its random transforms (v2.Resize and v2.CenterCrop instead of v2.RandomResizedCrop, and so on)"
            )
        return drawn


def _mean_step(points: torch.Tensor) -> float:
    """Mean distance of the points that neighbouring pixels show, the larger of both directions; 0 without points."""
    steps = [torch.hypot(*points.diff(dim=dim).unbind(-1)).nanmean() for dim in (0, 1)]
    return torch.stack(steps).nan_to_num(0).max().item()
