"""Images of the same kind and size with other pixels, to see what depends on the pixels of an image."""

from __future__ import annotations

import copy
from typing import Any, cast

import numpy as np
import PIL.Image
import torch

#: What becomes of the pixels.
INVERSE, DARK, BRIGHT = "inverse", "dark", "bright"


def altered(image: Any, how: str) -> Any | None:
    """An image of the same kind, size and type with other pixels; None if it is of an unknown kind.

    Args:
        image: PIL image, tensor or array.
        how: `INVERSE`, or `DARK` or `BRIGHT` all over.
    """
    if isinstance(image, PIL.Image.Image):
        return _altered_pil(image, how)
    if not isinstance(image, (torch.Tensor, np.ndarray)) or image.dtype in (torch.bool, bool, object):
        return None
    if not all(image.shape) or not image.shape:
        return None
    high = 255 if image.dtype in (torch.uint8, np.uint8) else max(1, image.max().item())
    other: Any = copy.deepcopy(image)
    other[...] = {INVERSE: high - image, DARK: image * 0, BRIGHT: image * 0 + high}[how]  # keeps the class
    return other


def _altered_pil(image: PIL.Image.Image, how: str) -> PIL.Image.Image:
    if image.mode in ("I", "F"):
        # Annotated for images of several channels too, which these modes do not have.
        low, high = cast(tuple[float, float], image.getextrema())
        scale, offset = {INVERSE: (-1, low + high), DARK: (0, 0), BRIGHT: (0, max(high, 1))}[how]
        return image.point(lambda value: value * scale + offset)
    values = np.frombuffer(image.tobytes(), np.uint8)
    values = {INVERSE: 255 - values, DARK: values * 0, BRIGHT: values * 0 + 255}[how]
    other = PIL.Image.frombytes(image.mode, image.size, values.astype(np.uint8).tobytes())
    if image.mode == "P":
        other.putpalette(image.getpalette() or [])
    other.info = dict(image.info)  # its orientation, for instance
    return other
