"""Kinds of images that a transform may be given: what is none, 16 bits, values of unknown range."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from hf_freezecache import ReplayableTransform


@pytest.mark.parametrize("image", [None, [[1, 2]], np.zeros((4, 4, 3)), torch.zeros(2, 4, 4), torch.zeros(4, 4)])
def test_what_is_no_image_is_an_error(image):
    with pytest.raises(TypeError, match="PIL image or a tensor"):
        draw_one(image)


def draw_one(image):
    steps = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    return ReplayableTransform(steps, steps)({"image": [image]})["pixel_values"][0]


@pytest.mark.parametrize("kind", ["I;16", "I;16B", "tensor"])
def test_images_of_16_bits_keep_their_brightness(kind):
    values = np.linspace(0, 65535, 35 * 47).reshape(35, 47).astype(np.uint16)
    if kind == "tensor":
        image = torch.from_numpy(values)[None]
    else:
        image = Image.frombytes(kind, (47, 35), values.astype(">u2" if kind == "I;16B" else "<u2").tobytes())
        assert image.mode == kind
    pixels = draw_one(image)
    assert pixels.shape == (3, 35, 47)
    assert (pixels[0] - torch.from_numpy(values.astype(np.float32) / 65535)).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(("mode", "value"), [("I", 1000), ("I", -1), ("F", 1000), ("F", 0.5)])
def test_pil_images_of_unknown_range_are_refused(mode, value):
    image = Image.fromarray(np.full((4, 4), value, dtype=np.int32 if mode == "I" else np.float32))
    assert image.mode == mode
    with pytest.raises(TypeError, match=f"mode '{mode}' has values.*scale it to 8 bits"):
        draw_one(image)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
def test_integers_of_unknown_range_are_refused(dtype):
    with pytest.raises(TypeError, match="uint8.*float32"):
        draw_one(torch.full((3, 4, 4), 200, dtype=dtype))
