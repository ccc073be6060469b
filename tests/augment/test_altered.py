"""Images of the same kind with other pixels."""

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision import tv_tensors

from hf_freezecache.augment.altered import BRIGHT, DARK, INVERSE, altered

PIXELS = np.random.default_rng(0).integers(10, 200, (5, 6, 3)).astype(np.uint8)
COLOURS = PIL.Image.fromarray(PIXELS)
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F")
SIXTEEN = PIL.Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 200)
TENSOR = torch.from_numpy(PIXELS).permute(2, 0, 1)
IMAGES = {
    **{mode: COLOURS.convert("L" if mode in ("1", "LA", "I", "F") else "RGB").convert(mode) for mode in MODES},
    "I;16": SIXTEEN,
    "uint8": TENSOR,
    "float32": TENSOR / 255,
    "int64": TENSOR.long(),
    "tv": tv_tensors.Image(TENSOR),
    "array": PIXELS,
    "array of floats": PIXELS / 255.0,
}


def values(image):
    return np.asarray(image.convert("RGB") if getattr(image, "mode", "") == "P" else image).astype(np.float64)


@pytest.mark.parametrize("name", IMAGES)
def test_altered_image_is_of_the_same_kind_with_other_pixels(name):
    image = IMAGES[name]
    before = values(image).copy()
    for how in (INVERSE, DARK, BRIGHT):
        other = altered(image, how)
        if isinstance(image, PIL.Image.Image):
            assert other.mode == image.mode and other.size == image.size
        else:
            assert type(other) is type(image) and other.dtype == image.dtype and other.shape == image.shape
        assert not np.array_equal(values(other), before)
    assert np.array_equal(values(image), before)
    if name not in ("P", "CMYK"):
        assert values(altered(image, DARK)).mean() < before.mean() < values(altered(image, BRIGHT)).mean()


@pytest.mark.parametrize(
    "image", ["a/path.png", b"bytes", {"bytes": b""}, torch.zeros(3, 0, 2), [[1, 2]], None], ids=str
)
def test_image_of_an_unknown_kind_is_none(image):
    assert altered(image, INVERSE) is None


def test_orientation_of_an_image_stays():
    image = COLOURS.copy()
    image.info["exif"] = b"Exif"
    assert altered(image, INVERSE).info["exif"] == b"Exif"
