"""A Transformers image processor as torchvision v2 pipelines: one for evaluation, and one with augmentation.

A `ReplayableTransform` takes both. The pipelines give the pixels of the processor itself where it resizes, crops,
rescales to 0..1 and normalizes, as nearly all processors of image classifiers do.
"""

from __future__ import annotations

from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

#: What `train_pipeline` can do to images.
AUGMENTATIONS = ("crop", "color", "none")
# The value of PIL's BICUBIC, which processors state as a number.
_BICUBIC = 3
# From this side on ConvNeXt resizes to the final size; smaller images are resized with a margin and cropped.
_CONVNEXT_WHOLE = 384


class UnitRange(v2.Transform):
    """Passes images on, and refuses floats outside 0..1: `v2.ToDtype(scale=True)` scales integers alone.

    Raises:
        ValueError: when called with such an image.
    """

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Image) and inpt.is_floating_point():
            low, high = inpt.min().item(), inpt.max().item()
            if not 0 <= low <= high <= 1:
                raise ValueError(
                    f"a float image has values from {low:.3g} to {high:.3g}; floats are expected from 0 to 1: divide "
                    "it by its brightest value, or store it as uint8. Leave the normalization to the pipeline."
                )
        return inpt


def base_pipeline(processor: Any, image_size: int | None = None) -> v2.Compose:
    """Makes the pipeline of the base view: it prepares images as the processor does, without randomness.

    A processor with a resize of its own (LeViT, Perceiver) or with values outside 0..1 before the normalization
    (EfficientNet) is followed only in the steps named here.

    Args:
        processor: image processor of Transformers; its `size`, `crop_size`, `crop_pct`, `resample`, `image_mean` and
            `image_std` are read.
        image_size: shorter side of the result in pixels; all sizes of the processor are scaled to it. None: the
            processor's own.

    Returns:
        Resize, centre crop (where the processor crops, or resizes the shorter side alone), floats and normalization.
        Images are 8-bit integers, or floats from 0 to 1.

    Raises:
        ValueError: if the processor states no size.
    """
    if getattr(processor, "size", None) is None:
        raise ValueError(
            f"{type(processor).__name__} states no size: write the pipelines by hand, as "
            "ReplayableTransform(train=v2.Compose([...]), base=v2.Compose([...]))"
        )
    resized, cropped, margin = _read_sides(processor)
    scale = 1.0 if image_size is None else image_size / min(cropped or resized)
    mode = InterpolationMode.BICUBIC if processor.resample == _BICUBIC else InterpolationMode.BILINEAR
    sides = [int(round(side * scale) / margin) for side in resized]
    steps = [v2.ToImage(), UnitRange(), v2.Resize(sides, mode, antialias=True)]
    if cropped:
        steps.append(v2.CenterCrop([round(side * scale) for side in cropped]))
    steps.append(v2.ToDtype(torch.float32, scale=True))
    if processor.do_normalize:
        steps.append(v2.Normalize(processor.image_mean, processor.image_std))
    return v2.Compose(steps)


def _read_sides(processor: Any) -> tuple[list[int], list[int] | None, float]:
    """Sides to resize to (one: the shorter side), sides of the centre crop, and the share that the crop shows."""
    size, crop = processor.size, processor.crop_size if processor.do_center_crop else None
    resized = [size.height, size.width] if size.height else [size.shortest_edge]
    margin = getattr(processor, "crop_pct", None) or 1.0
    if crop:
        return resized, [crop.height, crop.width], margin
    if margin < 1 and size.shortest_edge >= _CONVNEXT_WHOLE:
        return resized * 2, None, 1.0
    return resized, resized * 2 if len(resized) == 1 else None, margin


def train_pipeline(
    base: v2.Compose, augmentation: str = "crop", min_crop: float = 0.35, random_erasing: float = 0.0
) -> v2.Compose:
    """Makes the pipeline of the augmented views: the same size, interpolation and normalization as `base_pipeline`.

    Args:
        base: from `base_pipeline`.
        augmentation: `crop` (random resized crop, horizontal flip), `color` (the same and colour jitter) or `none`
            (the base pipeline itself).
        min_crop: smallest share of an image's area that a random crop shows.
        random_erasing: probability that a box of an image is replaced by zeros, after the normalization
            (arXiv 1708.04896); 0: never.

    Raises:
        ValueError: if there is no augmentation of this name, or the probability is not between 0 and 1.
    """
    if augmentation not in AUGMENTATIONS:
        raise ValueError(f"augmentation is one of {', '.join(AUGMENTATIONS)}, not {augmentation!r}")
    erasing = [v2.RandomErasing(random_erasing)] if random_erasing else []
    if augmentation == "none":
        return v2.Compose([*base.transforms, *erasing]) if erasing else base
    resize = next(step for step in base.transforms if isinstance(step, v2.Resize))
    crops = [step.size for step in base.transforms if isinstance(step, v2.CenterCrop)]
    size = crops[0] if crops else resize.size
    crop = v2.RandomResizedCrop(size, (min_crop, 1.0), interpolation=resize.interpolation)
    jitter = [v2.ColorJitter(0.3, 0.3, 0.3)] if augmentation == "color" else []
    finish = [step for step in base.transforms if isinstance(step, (v2.ToDtype, v2.Normalize))]
    return v2.Compose([v2.ToImage(), UnitRange(), crop, v2.RandomHorizontalFlip(), *jitter, *finish, *erasing])
