"""Processors of Transformers as torchvision pipelines."""

import pytest
import torch
import transformers
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from transformers import ViTImageProcessor

from hf_freezecache import ReplayableTransform
from hf_freezecache.augment.processors import AUGMENTATIONS, UnitRange, base_pipeline, train_pipeline

PROCESSORS = [
    ("ViTImageProcessor", {"size": {"height": 224, "width": 224}}),
    ("ViTImageProcessor", {"size": {"height": 96, "width": 64}}),
    ("ViTImageProcessor", {"do_normalize": False}),
    ("DeiTImageProcessor", {"size": {"height": 256, "width": 256}}),
    ("MobileNetV2ImageProcessor", {"size": {"shortest_edge": 256}}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}, "crop_pct": 0.95}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}),
    ("PoolFormerImageProcessor", {}),
    ("CLIPImageProcessor", {}),
]


@pytest.fixture(scope="module")
def image():
    return Image.radial_gradient("L").resize((300, 260)).convert("RGB")


@pytest.mark.parametrize(("kind", "settings"), PROCESSORS)
def test_base_pipeline_gives_the_pixels_of_the_processor(kind, settings, image):
    processor = getattr(transformers, kind)(**settings)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(base_pipeline(processor)(image), expected, atol=0.05, rtol=0)


@pytest.mark.parametrize(("kind", "settings"), PROCESSORS)
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_pipelines_scale_to_another_size(kind, settings, augmentation, image):
    processor = getattr(transformers, kind)(**settings)
    own = base_pipeline(processor)(image).shape
    base = base_pipeline(processor, min(own[1:]) // 2)
    expected = (3, own[1] // 2, own[2] // 2)
    assert base(image).shape == expected
    assert train_pipeline(base, augmentation)(image).shape == expected


def test_train_pipeline_draws_crops_flips_and_colours_with_the_base_pipelines_settings(image):
    base = base_pipeline(transformers.DeiTImageProcessor())
    without, plain, colour = (train_pipeline(base, name, min_crop=0.5) for name in ("none", "crop", "color"))
    assert without is base
    kinds = [type(step) for step in plain.transforms]
    assert kinds == [v2.ToImage, UnitRange, v2.RandomResizedCrop, v2.RandomHorizontalFlip, v2.ToDtype, v2.Normalize]
    crop = plain.transforms[2]
    assert (list(crop.size), crop.scale, crop.interpolation) == ([224, 224], (0.5, 1.0), InterpolationMode.BICUBIC)
    assert [type(step) for step in colour.transforms] == [*kinds[:4], v2.ColorJitter, *kinds[4:]]
    assert plain.transforms[-1].mean == base.transforms[-1].mean
    torch.manual_seed(0)
    assert not torch.equal(plain(image), plain(image))


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_boxes_are_erased_after_the_normalization_where_that_is_asked_for(augmentation, image):
    base = base_pipeline(transformers.DeiTImageProcessor())
    without, erasing = (train_pipeline(base, augmentation, random_erasing=share) for share in (0.0, 1.0))
    assert [type(step) for step in erasing.transforms] == [*map(type, without.transforms), v2.RandomErasing]
    torch.manual_seed(0)
    assert (erasing(image) == 0).all(0).sum() > 100
    with pytest.raises(ValueError, match="interval"):
        train_pipeline(base, augmentation, random_erasing=1.5)


def test_pipelines_are_those_of_a_replayable_transform(image):
    base = base_pipeline(transformers.ViTImageProcessor(), 32)
    torch.manual_seed(0)
    expected = train_pipeline(base, "color")(image)
    torch.manual_seed(0)
    (pixels,) = ReplayableTransform(train_pipeline(base, "color"), base)({"image": [image]})["pixel_values"]
    assert torch.equal(pixels, expected)


def test_unknown_augmentation_is_refused_by_name():
    with pytest.raises(ValueError, match="crop, color, none, not 'mixup'"):
        train_pipeline(base_pipeline(transformers.ViTImageProcessor()), "mixup")


def test_processor_without_a_size_is_refused_by_name():
    processor = transformers.ViTImageProcessor()
    processor.size = None
    with pytest.raises(ValueError, match="ViTImageProcessor states no size"):
        base_pipeline(processor)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("scale", [255.0, -1.0])
def test_float_images_outside_their_range_are_refused(augmentation, scale):
    base = base_pipeline(ViTImageProcessor(size={"height": 8, "width": 8}))
    pipeline = train_pipeline(base, augmentation)
    image = tv_tensors.Image(torch.rand(3, 12, 12) * scale)
    with pytest.raises(ValueError, match="floats are expected from 0 to 1"):
        pipeline(image)
    assert pipeline(tv_tensors.Image(torch.rand(3, 12, 12))).shape == (3, 8, 8)
