import pickle
import random
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from datasets.fingerprint import Hasher
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.images import identity_geometry
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from hf_freezecache import ReplayableTransform
from hf_freezecache.augment.draws import Draw, use_draw
from hf_freezecache.augment.geometry import DENSE, PROJECTIVE, cell_centres, decode_geometry, warp
from hf_freezecache.rng import seeded_rng

KINDS = (PROJECTIVE, DENSE)
SIZE = 32
GRID = (SIZE, SIZE)
DRAWS = 6
BILINEAR = InterpolationMode.BILINEAR
RESIZE = v2.Resize(GRID)
END = (v2.ToImage(), v2.ToDtype(torch.float32, scale=True))
FILLS = [0, 128, (1, 2, 3), {Image.Image: 9, tv_tensors.Image: 9}]
FILLING = {
    "crop": partial(v2.RandomCrop, SIZE, padding=6),
    "affine": partial(v2.RandomAffine, 20, (0.2, 0.2)),
    "rotation": partial(v2.RandomRotation, (30, 40)),
    "perspective": partial(v2.RandomPerspective, 0.5, p=1),
}

# Mean error of a warped image in grey levels: rounding base and view makes up to 0.5, taking the nearest pixel (the
# default of rotations) 0.8.
ROUNDING, NEAREST = 0.6, 0.9
GEOMETRIC = {
    "horizontal flip": ([v2.RandomHorizontalFlip(0.5), RESIZE], ROUNDING),
    "vertical flip": ([RESIZE, v2.RandomVerticalFlip(0.5)], ROUNDING),
    "crop": ([v2.Resize((40, 40)), v2.RandomCrop(SIZE)], ROUNDING),
    "padded crop": ([RESIZE, v2.RandomCrop(SIZE, padding=4)], ROUNDING),
    "centre crop": ([v2.Resize((38, 40)), v2.CenterCrop(SIZE)], ROUNDING),
    "centre crop of less": ([v2.Resize((24, 40)), v2.CenterCrop(SIZE)], ROUNDING),
    "resize": ([RESIZE], ROUNDING),
    "resized crop": ([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip()], ROUNDING),
    "resized crop of a detail": ([v2.RandomResizedCrop(SIZE, scale=(0.02, 0.04))], ROUNDING),
    "rotation": ([RESIZE, v2.RandomRotation(30)], NEAREST),
    "smooth rotation": ([RESIZE, v2.RandomRotation(30, interpolation=BILINEAR)], ROUNDING),
    "rotation with all corners": ([v2.RandomRotation(30, expand=True, interpolation=BILINEAR), RESIZE], ROUNDING),
    "affine": ([RESIZE, v2.RandomAffine(15, (0.1, 0.1), (0.7, 1.3), 9, interpolation=BILINEAR)], ROUNDING),
    "perspective": ([v2.RandomPerspective(0.4, p=1), RESIZE], ROUNDING),
    "zoom out": ([v2.RandomZoomOut(side_range=(1, 2), p=1), RESIZE], ROUNDING),
    "padding": ([v2.Pad((5, 9, 0, 3)), RESIZE], ROUNDING),
    "scale jitter": ([v2.ScaleJitter(GRID, (0.8, 1.5)), v2.RandomCrop(SIZE, pad_if_needed=True)], ROUNDING),
    "choice": ([RESIZE, v2.RandomChoice([v2.RandomHorizontalFlip(1), v2.RandomCrop(SIZE, padding=4)])], ROUNDING),
    "order": ([RESIZE, v2.RandomOrder([v2.RandomVerticalFlip(), v2.RandomHorizontalFlip()])], ROUNDING),
    "maybe": ([RESIZE, v2.RandomApply([v2.RandomRotation((90, 90))])], ROUNDING),
}
# What homographies do not show.
BENDING = {
    "reflected padding": ([RESIZE, v2.RandomCrop(SIZE, padding=8, padding_mode="reflect")], ROUNDING),
    "elastic": ([RESIZE, v2.ElasticTransform(alpha=60.0)], ROUNDING),
    "erasing": ([RESIZE, *END, v2.RandomErasing(p=1)], ROUNDING),
    "turned crop": ([v2.RandomResizedCrop(SIZE, scale=(0.2, 0.3)), v2.RandomRotation((30, 40))], NEAREST),
}
PHOTOMETRIC = {
    "jitter": [v2.ColorJitter(0.4, 0.4, 0.4, 0.1)],
    "blur": [v2.GaussianBlur(5)],
    "grey": [v2.RandomGrayscale(0.5), v2.Grayscale(3)],
    "distortion": [v2.RandomPhotometricDistort()],
    "equalize": [v2.RandomEqualize(), v2.RandomAutocontrast(), v2.RandomInvert()],
    "noise": [*END, v2.GaussianNoise()],
    "jpeg": [v2.PILToTensor(), v2.JPEG((50, 90))],
    "channels": [v2.RandomChannelPermutation()],
    "normalize": [*END, v2.Normalize((0.5, 0.5, 0.5), (0.2, 0.3, 0.4))],
    "lambda for images": [v2.Lambda(lambda image: image.convert("L").convert("RGB"), Image.Image)],
}


def smooth(height=45, width=61):
    """A picture whose interpolation errs by less than a grey level, and that tells left from right."""
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    planes = [127 + 90 * (2 * x + y).sin(), 127 + 90 * (2 * y - x).cos(), 60 + 150 * x * y]
    return Image.fromarray(torch.stack(planes, -1).round().to(torch.uint8).numpy())


def pipeline(transforms):
    return v2.Compose([*transforms] if END[0] in transforms else [*transforms, *END])


def replayable(transforms, base=(RESIZE,)):
    return ReplayableTransform(pipeline(transforms), pipeline(base))


def fetch(transform, images, samples=None, **settings):
    """Pixels of what is drawn for the samples, and the drawing."""
    drawn = Draw(settings.pop("seed", 0), samples or list(range(len(images))), **settings)
    with use_draw(drawn):
        return torch.stack(transform({"image": list(images)})["pixel_values"]), drawn


def warped_base(transform, images, kind, grid=GRID):
    """Views, and their base views where they show them (NaN outside)."""
    base, _ = fetch(transform, images, view=0)
    views, drawn = fetch(transform, images, view=1, geometry=(kind, grid))
    assert drawn.refused is None, drawn.refused
    rows = torch.stack(drawn.geometries)
    sources = decode_geometry(rows, kind, grid)
    return views, warp(base, sources, torch.full((3,), torch.nan)), rows


def inner(shown):
    """Shown pixels with nothing but shown ones around them: a pixel at the border may be mixed with the filling."""
    outside = torch.nn.functional.pad((~shown).float()[:, None], (1, 1, 1, 1), value=1)
    return torch.nn.functional.max_pool2d(outside, 3, stride=1)[:, 0] == 0


def mean_error(views, warped):
    shown = inner(warped.isfinite().all(1))
    return 255 * (views - warped).abs().mean(1)[shown].mean(), shown.float().mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["PIL", "tensor"])
@pytest.mark.parametrize("name", GEOMETRIC)
def test_warped_base_image_is_the_view(name, source, kind):
    transforms, bound = GEOMETRIC[name]
    image = smooth() if source == "PIL" else v2.functional.pil_to_tensor(smooth())
    views, warped, rows = warped_base(replayable(transforms), [image] * DRAWS, kind)
    assert not rows.float().isnan().any(), "a misfit"
    error, share = mean_error(views, warped)
    assert share > 0.3
    assert error < bound


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(45, 61), (375, 500), (20, 16)], ids=str)
def test_resized_crop_is_found_to_a_part_of_a_pixel(kind, sizes):
    height, width = sizes
    crop = v2.RandomResizedCrop(SIZE, scale=(0.3, 1))
    transform, image = replayable([crop]), smooth(height, width)
    for sample in range(DRAWS):
        _, drawn = fetch(transform, [image], samples=[sample], view=1, geometry=(kind, (8, 8)))
        with seeded_rng(*drawn.key(sample)):
            box = crop.make_params([image])
        corner = torch.tensor([box["left"] / width, box["top"] / height])
        extent = torch.tensor([box["width"] / width, box["height"] / height])
        expected = 2 * (corner + extent * (cell_centres((8, 8)) + 1) / 2) - 1
        found = decode_geometry(torch.stack(drawn.geometries), kind, (8, 8))[0]
        pixels = (found - expected) * torch.tensor([width, height]) / 2
        assert pixels[1:-1, 1:-1].abs().max() < 0.05


@pytest.mark.parametrize("name", BENDING)
def test_what_no_homography_shows_is_a_misfit_and_works_densely(name):
    transforms, bound = BENDING[name]
    transform, images = replayable(transforms), [smooth()] * DRAWS
    _, _, rows = warped_base(transform, images, PROJECTIVE)
    assert rows.isnan().all()
    error, share = mean_error(*warped_base(transform, images, DENSE)[:2])
    assert share > 0.3
    assert error < bound


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flip, dims", [(v2.RandomHorizontalFlip(1), [-1]), (v2.RandomVerticalFlip(1), [-2])])
def test_flips_are_exact(kind, flip, dims):
    transform = replayable([RESIZE, flip])
    views, warped, _ = warped_base(transform, [smooth()], kind)
    assert torch.equal(warped, views)
    features = torch.randn(1, 4, 7, 7)
    _, drawn = fetch(transform, [smooth()], view=1, geometry=(kind, (7, 7)))
    sources = decode_geometry(torch.stack(drawn.geometries), kind, (7, 7))
    assert torch.equal(warp(features, sources), features.flip(dims))


def test_erased_rectangle_is_outside():
    transform = replayable([RESIZE, *END, v2.RandomErasing(p=1, value=2.0)])
    views, warped, _ = warped_base(transform, [smooth()] * DRAWS, DENSE)
    assert torch.equal(warped.isnan()[:, 0], views[:, 0] == 2)
    assert torch.equal(warped[~warped.isnan()], views[~warped.isnan()])


@pytest.mark.parametrize("fill", FILLS, ids=str)
@pytest.mark.parametrize("name", FILLING)
@pytest.mark.parametrize("kind", KINDS)
def test_filling_is_outside_whatever_its_value(name, fill, kind):
    bright = Image.new("RGB", GRID, (255, 255, 255))
    views, warped, _ = warped_base(
        replayable([FILLING[name](fill=fill)], base=(v2.Identity(),)), [bright] * DRAWS, kind
    )
    filled = (views < 1).any(1)
    assert 0.05 < filled.float().mean() < 0.9
    assert (warped.isnan().any(1) == filled).float().mean() > 0.97


@pytest.mark.parametrize("name", PHOTOMETRIC)
@pytest.mark.parametrize("kind", KINDS)
def test_colours_leave_the_geometry_alone(name, kind):
    _, drawn = fetch(replayable([RESIZE, *PHOTOMETRIC[name]]), [smooth()] * DRAWS, view=1, geometry=(kind, (4, 4)))
    assert drawn.refused is None
    expected = identity_geometry(DRAWS, kind, (4, 4)).float()
    assert torch.allclose(torch.stack(drawn.geometries).float(), expected, atol=2 if kind == DENSE else 1e-5)


@pytest.mark.parametrize("name", [*GEOMETRIC, *BENDING, *PHOTOMETRIC])
def test_pixels_do_not_depend_on_whether_geometry_is_wanted(name):
    transforms = {**GEOMETRIC, **BENDING}[name][0] if name not in PHOTOMETRIC else [RESIZE, *PHOTOMETRIC[name]]
    transform, images = replayable(transforms), [smooth()] * DRAWS
    plain, _ = fetch(transform, images, view=2)
    for kind in KINDS:
        with_geometry, drawn = fetch(transform, images, view=2, geometry=(kind, (4, 4)))
        assert len(drawn.geometries) == DRAWS
        assert torch.equal(with_geometry, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_centre_cropping_base_keeps_what_lies_beyond_it(kind):
    transform = replayable([RESIZE], base=(v2.Resize((64, 64)), v2.CenterCrop(SIZE)))
    views, warped, rows = warped_base(transform, [smooth()], kind)
    sources = decode_geometry(rows, kind, GRID)
    assert not sources.isnan().any()
    assert torch.allclose(sources[0, 0, 0], torch.tensor([-1.9375, -1.9375]), atol=1e-3)
    shown = warped.isfinite().all(1)
    assert shown[:, 8:24, 8:24].all() and shown.float().mean() == 0.25
    assert mean_error(views, warped)[0] < ROUNDING


def test_base_is_captured_for_each_size_of_image():
    transform = replayable([v2.RandomHorizontalFlip(1), RESIZE], base=(v2.Resize(SIZE), v2.CenterCrop(SIZE)))
    images = [smooth(40, 80), smooth(80, 40), smooth(64, 64), smooth(40, 80)]
    views, warped, rows = warped_base(transform, images, PROJECTIVE)
    assert torch.allclose(rows[:, 0].abs(), torch.tensor([2.0, 1, 1, 2]), atol=0.01)
    assert torch.allclose(rows[:, 4].abs(), torch.tensor([1.0, 2, 1, 1]), atol=0.01)
    assert torch.equal(rows[0], rows[3])
    assert mean_error(views, warped)[0] < ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_view_that_shows_nothing_is_outside(kind):
    transform = replayable([v2.Pad(100), v2.Lambda(lambda image: v2.functional.crop(image, 0, 0, SIZE, SIZE))])
    views, warped, _ = warped_base(transform, [smooth()], kind)
    assert (views == 0).all() and warped.isnan().all()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 50), st.integers(1, 50), st.sampled_from(["L", "LA", "P", "RGBA", "CMYK", "1", "RGB", "I", "F"]))
def test_images_of_any_size_and_mode_are_drawn_as_rgb(height, width, mode):
    image = smooth(height, width).convert("L" if mode in ("LA", "I", "F") else "RGB").convert(mode)
    transform = replayable([v2.RandomCrop(SIZE, padding=8, pad_if_needed=True), v2.RandomHorizontalFlip()])
    pixels, drawn = fetch(transform, [image], view=1, geometry=(DENSE, (4, 4)))
    assert drawn.refused is None and pixels.shape == (1, 3, SIZE, SIZE)
    assert torch.equal(pixels, fetch(transform, [image.convert("RGB")], view=1)[0])


def test_tensors_of_one_three_and_four_channels_are_drawn_as_rgb():
    transform = replayable([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip()])
    colours = v2.functional.pil_to_tensor(smooth(33, 47))
    expected, _ = fetch(transform, [colours], view=1)
    opaque = torch.cat([colours, torch.full((1, 33, 47), 255, dtype=torch.uint8)])
    for same in (tv_tensors.Image(colours), opaque):
        assert torch.equal(fetch(transform, [same], view=1, geometry=(PROJECTIVE, (4, 4)))[0], expected)
    grey, _ = fetch(transform, [colours[:1]], view=1)
    assert torch.equal(grey, fetch(transform, [colours[:1].repeat(3, 1, 1)], view=1)[0])
    assert type(transform({"image": [colours]})["pixel_values"][0]) is torch.Tensor


def plain_function(image):
    return v2.functional.to_dtype(v2.functional.pil_to_tensor(image.resize(GRID)), torch.float32, scale=True)


def flip_each_alone(image):
    return image if torch.rand(()) < 0.5 else v2.functional.horizontal_flip(image)


def shrink_in_place(image):
    image.div_(255)
    return image


def double_in_place(image):
    image.mul_(2)
    return image


def fall_to_zero_in_place(image):
    image.sub_(image.mean((1, 2), keepdim=True))
    return image


class DrawsForMasks(v2.Transform):
    def transform(self, inpt, params):
        if isinstance(inpt, tv_tensors.Mask):
            torch.rand(())
        return inpt


class CropsImagesAlone(v2.Transform):
    def transform(self, inpt, params):
        return inpt if isinstance(inpt, tv_tensors.Mask) else v2.functional.center_crop(inpt, [16, 16])


class ForgetsMasks(v2.Transform):
    def forward(self, *inputs):
        return inputs[0]


REFUSED = {
    "RandAugment": (pipeline([v2.RandAugment(), RESIZE]), "not supported by RandAugment"),
    "AutoAugment": (pipeline([v2.AutoAugment(), RESIZE]), "not supported by AutoAugment"),
    "TrivialAugmentWide": (pipeline([v2.TrivialAugmentWide(), RESIZE]), "not supported by TrivialAugmentWide"),
    "AugMix": (pipeline([v2.AugMix(), RESIZE]), "not supported by AugMix"),
    "plain function": (plain_function, "takes 1 positional argument"),
    "sequential": (torch.nn.Sequential(RESIZE, *END), "takes 2 positional arguments"),
    "PIL lambda": (pipeline([v2.Lambda(lambda image: image.rotate(90)), RESIZE]), "AttributeError"),
    "lambda that draws": (pipeline([v2.Lambda(flip_each_alone), RESIZE]), "draws other random numbers"),
    "lambda before draws": (pipeline([RESIZE, v2.Lambda(flip_each_alone), v2.RandomHorizontalFlip()]), "draws other"),
    "lambda of values": (pipeline([RESIZE, *END, v2.Lambda(lambda image: image * 2)]), "changes the type of masks"),
    "lambda in place": (pipeline([RESIZE, *END, v2.Lambda(shrink_in_place)]), "changes the values of masks"),
    "doubled in place": (pipeline([RESIZE, *END, v2.Lambda(double_in_place)]), "changes the values of masks"),
    "mean in place": (pipeline([RESIZE, *END, v2.Lambda(fall_to_zero_in_place)]), "changes the values of masks"),
    "untyped": (pipeline([RESIZE, *END, v2.ToPureTensor(), v2.RandomHorizontalFlip(1)]), "changes the type of masks"),
    "whole numbers": (
        pipeline([RESIZE, *END, v2.ToDtype({tv_tensors.Image: torch.float32, "others": torch.int32})]),
        "changes the type of masks",
    ),
    "draws for masks": (pipeline([RESIZE, DrawsForMasks()]), "draws other random numbers"),
    "masks as they were": (pipeline([CropsImagesAlone()]), r"another size than images: \(45, 61\), not \(16, 16\)"),
    "no masks": (v2.Compose([RESIZE, *END, ForgetsMasks()]), "does not return an image with its mask"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_pipeline_that_does_not_tell_is_refused_and_still_drawn(name):
    train, reason = REFUSED[name]
    transform, images = ReplayableTransform(train, pipeline([RESIZE])), [smooth()] * DRAWS
    plain, _ = fetch(transform, images, view=1)
    pixels, drawn = fetch(transform, images, view=1, geometry=(PROJECTIVE, (4, 4)))
    assert drawn.geometries == []
    assert "\n" not in drawn.refused
    with pytest.raises(ValueError, match=reason):
        raise ValueError(drawn.refused)
    assert torch.equal(pixels, plain)


@pytest.mark.parametrize(
    "base, reason",
    [
        (pipeline([RESIZE, CropsImagesAlone()]), "another size"),
        (pipeline([v2.Pad(20, padding_mode="reflect"), RESIZE]), "base pipeline does more than resize and crop"),
        (
            pipeline([v2.Pad(99), v2.Lambda(lambda image: image[..., :8, :8], tv_tensors.Mask), RESIZE]),
            "type of masks",
        ),
        (plain_function, "the base pipeline does not take an image with a mask: TypeError"),
    ],
)
def test_base_that_is_no_resize_is_refused_with_a_reason(base, reason):
    transform = ReplayableTransform(pipeline([RESIZE]), base)
    for _ in range(2):
        pixels, drawn = fetch(transform, [smooth()] * 2, view=1, geometry=(PROJECTIVE, (4, 4)))
        assert reason in drawn.refused
        assert drawn.geometries == [] and len(pixels) == 2


def test_error_of_the_pipeline_itself_is_raised():
    with pytest.raises(ValueError, match="larger"):
        fetch(replayable([v2.RandomCrop(1000)]), [smooth()], view=1, geometry=(PROJECTIVE, (4, 4)))


class DrawsEverywhere(v2.Transform):
    def transform(self, inpt, params):
        return inpt + random.random() + np.random.rand() + torch.rand(())


EVERYWHERE = [v2.RandomResizedCrop(SIZE), *END, DrawsEverywhere()]


@pytest.mark.parametrize("settings", [{"view": 2}, {"epoch": 3}], ids=str)
def test_draw_depends_on_its_key_alone(settings):
    transform, images = replayable(EVERYWHERE), [smooth(30 + n, 40) for n in range(4)]
    together, _ = fetch(transform, images, samples=[5, 1, 7, 3], **settings)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    backwards, _ = fetch(pickle.loads(pickle.dumps(transform)), images[::-1], samples=[3, 7, 1, 5], **settings)
    assert torch.equal(together.flip(0), backwards)
    alone, _ = fetch(transform, images[2:3], samples=[7], **settings)
    assert torch.equal(together[2:3], alone)


@pytest.mark.parametrize("other", [{"seed": 1}, {"view": 2}, {"samples": [1]}, {"view": None, "epoch": 1}], ids=str)
def test_other_key_is_another_draw(other):
    transform = replayable(EVERYWHERE)
    first, _ = fetch(transform, [smooth()], view=1)
    second, _ = fetch(transform, [smooth()], **{"view": 1, **other})
    assert not torch.equal(first, second)


@pytest.mark.parametrize("settings", [{"view": 0}, {"view": 1, "geometry": (DENSE, (4, 4))}, {"epoch": 0}], ids=str)
def test_generators_are_left_untouched(settings):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    fetch(replayable(EVERYWHERE), [smooth()] * 2, **settings)
    assert states() == before


def test_used_alone_it_draws_from_the_global_generators():
    train = pipeline([v2.RandomResizedCrop(SIZE), v2.ColorJitter(0.4)])
    transform = ReplayableTransform(train, pipeline([RESIZE]))
    torch.manual_seed(7)
    expected = [train(smooth()) for _ in range(2)]
    torch.manual_seed(7)
    rows = transform({"label": [1, 2], "image": [smooth()] * 2})
    assert rows["label"] == [1, 2] and "image" not in rows
    assert torch.equal(torch.stack(rows["pixel_values"]), torch.stack(expected))
    assert not torch.equal(*rows["pixel_values"])


def image_dataset(rows=6):
    features = datasets.Features(image=datasets.Image(), labels=datasets.Value("int64"))
    images = [smooth(20 + n, 33).convert("L" if n % 2 else "RGB") for n in range(rows)]
    return datasets.Dataset.from_dict({"image": images, "labels": list(range(rows))}, features=features)


def test_dataset_draws_the_samples_that_are_fetched():
    transform = replayable([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip()])
    dataset = image_dataset().with_transform(transform)

    def rows_of(samples, **settings):
        with use_draw(Draw(0, samples, **settings)) as drawn:
            return dataset.__getitems__(samples), drawn

    for wanted in ({"epoch": 2}, {"view": 0}, {"view": 1}):
        first, _ = rows_of([4, 0, 3], **wanted)
        second, _ = rows_of([3, 4], **wanted)
        assert [row["labels"] for row in first] == [4, 0, 3]
        assert torch.equal(first[0]["pixel_values"], second[1]["pixel_values"])
        assert torch.equal(first[2]["pixel_values"], second[0]["pixel_values"])
    _, drawn = rows_of([4, 0, 3], view=1, geometry=(PROJECTIVE, (4, 4)))
    assert torch.stack(drawn.geometries).isfinite().all() and len(drawn.geometries) == 3
    with use_draw(Draw(0, [2], epoch=2)):
        single = dataset[2]["pixel_values"]
    assert torch.equal(single, rows_of([1, 2], epoch=2)[0][1]["pixel_values"])


def test_used_transform_is_hashed_and_pickled_like_a_new_one():
    def make():
        return replayable([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.ColorJitter(0.1)])

    used, fresh = make(), make()
    for view in range(2):
        fetch(used, [smooth()] * 2, view=view, geometry=(PROJECTIVE, (4, 4)))
    assert Hasher.hash(used) == Hasher.hash(fresh)
    assert pickle.dumps(used) == pickle.dumps(ReplayableTransform(used.train, used.base))
    assert torch.equal(
        fetch(pickle.loads(pickle.dumps(used)), [smooth()], view=1)[0], fetch(used, [smooth()], view=1)[0]
    )
    assert Hasher.hash(replayable([v2.RandomResizedCrop(16)])) != Hasher.hash(fresh)


def test_repr_shows_the_pipelines():
    text = repr(ReplayableTransform(pipeline([v2.RandomHorizontalFlip(0.3)]), pipeline([RESIZE]), "picture"))
    assert "RandomHorizontalFlip(p=0.3)" in text and "Resize(" in text and "'picture'" in text


def test_missing_image_column_says_what_to_set():
    with pytest.raises(ValueError, match=r"'image' among \['labels'\].*remove_unused_columns=False.*image_column="):
        replayable([RESIZE])({"labels": [1]})
    transform = ReplayableTransform(pipeline([RESIZE]), pipeline([RESIZE]), image_column="picture")
    assert transform({"picture": [smooth()]})["pixel_values"][0].shape == (3, SIZE, SIZE)


@pytest.mark.parametrize("settings", [{"view": 0}, {"view": 1, "geometry": (PROJECTIVE, (4, 4))}], ids=str)
@pytest.mark.parametrize(
    "base",
    [v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.RandomErasing(0.01), v2.RandomApply([RESIZE], 0.9)],
    ids=str,
)
def test_random_base_is_an_error_with_advice(base, settings):
    """Also where two draws would most often look alike."""
    with pytest.raises(ValueError, match="`base` draws random numbers.*v2.CenterCrop"):
        fetch(replayable([RESIZE], base=(RESIZE, base)), [smooth()], **settings)


@pytest.mark.parametrize("settings", [{"epoch": 0}, {"view": 1}], ids=str)
def test_pipeline_without_tensors_at_its_end_is_an_error_with_advice(settings):
    transform = ReplayableTransform(v2.Compose([RESIZE]), pipeline([RESIZE]))
    with pytest.raises(ValueError, match=r"train pipeline must end in a tensor \(C, H, W\), got Image; .*v2.ToImage"):
        fetch(transform, [smooth()], **settings)
