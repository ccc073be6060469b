"""Functions of rows, as in Transformers' `run_image_classification.py`: what they draw, and the geometry of it."""

import logging
import random
import threading

import numpy as np
import PIL.Image
import pytest
import torch
from augment.test_transforms import (
    BILINEAR,
    DRAWS,
    GRID,
    NEAREST,
    ROUNDING,
    SIZE,
    fetch,
    mean_error,
    smooth,
    warped_base,
)
from torch.nn.functional import interpolate
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.transforms import functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2.functional._utils import _KERNEL_REGISTRY

from hf_freezecache import ReplayableTransform
from hf_freezecache.augment import following
from hf_freezecache.augment.coordinate_grid import GridRefusedError, make_grid
from hf_freezecache.augment.geometry import DENSE, PROJECTIVE

KINDS = (PROJECTIVE, DENSE)
END = {
    v1: [v1.ToTensor()],
    v2: [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)],
}


def of_rows(transforms, pipelines=v1):
    """A function of rows in the way of the official script."""
    transform = pipelines.Compose([*transforms, *END[pipelines]]) if isinstance(transforms, list) else transforms

    def function(example_batch):
        example_batch["pixel_values"] = [transform(image.convert("RGB")) for image in example_batch["image"]]
        return example_batch

    return function


def replayable(train, pipelines=v1):
    return ReplayableTransform(train=of_rows(train, pipelines), base=of_rows([v1.Resize(GRID)]))


def textured(seed=0, height=45, width=61):
    """A picture that looks like no moved or mirrored one of itself."""
    noise = torch.rand(1, 3, 9, 12, generator=torch.Generator().manual_seed(seed))
    return F.to_pil_image(interpolate(noise, (height, width), mode="bilinear")[0])


def geometric(t):
    return {
        "resized crop and flip": ([t.RandomResizedCrop(SIZE), t.RandomHorizontalFlip()], ROUNDING),
        "padded crop": ([t.Resize(GRID), t.RandomCrop(SIZE, padding=4)], ROUNDING),
        "rotation": ([t.Resize(GRID), t.RandomRotation(30)], NEAREST),
        "affine": ([t.Resize(GRID), t.RandomAffine(15, (0.1, 0.1), (0.7, 1.3), 9, interpolation=BILINEAR)], ROUNDING),
        "perspective": ([t.RandomPerspective(0.4, p=1), t.Resize(GRID)], ROUNDING),
        "centre crop": ([t.Resize(40), t.CenterCrop(SIZE), t.RandomVerticalFlip()], ROUNDING),
        "grey, jitter, blur": (
            [t.RandomResizedCrop(SIZE), t.ColorJitter(0.01), t.RandomGrayscale(0.0), t.GaussianBlur(3, 0.1)],
            1.5,
        ),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pipelines", [v1, v2], ids=["v1", "v2"])
@pytest.mark.parametrize("name", geometric(v1))
def test_warped_base_image_is_the_view(name, pipelines, kind):
    transforms, bound = geometric(pipelines)[name]
    views, warped, rows = warped_base(replayable(transforms, pipelines), [smooth()] * DRAWS, kind)
    assert not rows.float().isnan().any(), "a misfit"
    error, share = mean_error(views, warped)
    assert share > 0.3 and error < bound


@pytest.mark.parametrize("pipelines", [v1, v2], ids=["v1", "v2"])
def test_erased_part_shows_nothing(pipelines):
    transform = pipelines.Compose([*END[pipelines], pipelines.RandomErasing(p=1, value=2, inplace=True)])
    make = ReplayableTransform(train=of_rows(transform), base=of_rows([], pipelines))
    views, warped, _ = warped_base(make, [textured(seed, SIZE, SIZE) for seed in range(DRAWS)], DENSE)
    assert torch.equal(warped.isnan()[:, 0], views[:, 0] == 2) and (views == 2).any()
    assert torch.equal(warped[~warped.isnan()], views[~warped.isnan()])


def colours(t):
    return {
        "jitter": t.ColorJitter(0.5, 0.5, 0.5, 0.3),
        "grey": t.RandomGrayscale(0.5),
        "solarize": t.RandomSolarize(128, 1),
        "equalize": t.RandomEqualize(0.5),
        "invert": t.RandomInvert(0.5),
        "RandAugment": t.RandAugment(),
    }


@pytest.mark.parametrize("pipelines", [v1, v2], ids=["v1", "v2"])
@pytest.mark.parametrize("name", colours(v1))
def test_changed_colours_are_proved_too(name, pipelines):
    transform = replayable([pipelines.RandomResizedCrop(SIZE), colours(pipelines)[name]], pipelines)
    _, drawn = fetch(transform, [textured(seed) for seed in range(30)], view=1, geometry=(DENSE, (4, 4)))
    assert drawn.refused is None and len(drawn.geometries) == 30
    assert transform._proof.judged > 20 and transform._proof.wrong <= 1


def numpy_flip(image):
    return v1.Compose([v1.RandomCrop(SIZE), v1.ToTensor()])(PIL.Image.fromarray(np.array(image)[:, ::-1]))


def pil_crop(image):
    return F.to_tensor(image.crop((3, 3, 3 + SIZE, 3 + SIZE)))


def numpy_end(image):
    return torch.from_numpy(np.array(F.hflip(image), np.float32)).permute(2, 0, 1)


def four_corners(image):
    return v1.FiveCrop(SIZE)(F.to_tensor(image))[random.randrange(5)]


def test_call_that_fails_for_a_mask_is_told_with_its_traceback(caplog):
    def fail(grid, *args, **kwargs):
        raise TypeError("no masks here")

    image, grid = textured(), make_grid(45, 61)
    caplog.set_level("DEBUG", logger=following.__name__)
    followed = following.Followed(image, grid)
    flipped = followed.call("flip", image, lambda: image.copy(), fail)
    with pytest.raises(GridRefusedError, match="`flip` does not take a mask: TypeError: no masks here"):
        followed.grid_of(flipped)
    [record] = [record for record in caplog.records if "does not take a mask" in record.getMessage()]
    assert isinstance(record.exc_info[1], TypeError)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (numpy_flip, "the train function cannot be followed: `crop` gets an image that no followed call has returned"),
        (pil_crop, "`to_tensor` gets an image .*PIL's own crops.* cannot be followed.* after `convert`"),
        (numpy_end, "its pixels are an image that no followed call has returned .* after `hflip`"),
        (four_corners, "after `to_tensor`"),
    ],
)
def test_function_that_cannot_be_followed_is_refused_and_still_drawn(broken, reason):
    transform, images = replayable(broken), [textured()] * 2
    plain, _ = fetch(transform, images, view=1)
    pixels, drawn = fetch(transform, images, view=1, geometry=(PROJECTIVE, (4, 4)))
    assert torch.equal(plain, pixels) and drawn.geometries == [] and "\n" not in drawn.refused
    with pytest.raises(ValueError, match=reason):
        raise ValueError(drawn.refused)


def crop_in_place(image):
    """What no followed call does and no identity tells: the pixels of a known image are replaced."""
    left, top = random.randrange(12), random.randrange(12)
    image = image.copy()
    image.paste(image.crop((left, top, left + 32, top + 32)).resize(image.size))
    return F.to_tensor(F.resize(image, GRID))


def flip_in_place(image):
    pixels = F.to_tensor(F.resize(image, GRID))
    return pixels.copy_(pixels.flip(2).clone()) if random.random() < 0.5 else pixels


def shift_in_place(image):
    pixels = F.to_tensor(v1.RandomResizedCrop(SIZE)(image))
    return pixels.copy_(pixels.roll((3, 3), (1, 2)).clone())


@pytest.mark.parametrize("wrong", [crop_in_place, flip_in_place, shift_in_place])
def test_wrong_geometry_is_found_by_the_proof(wrong):
    transform = replayable(wrong)
    _, drawn = fetch(transform, [textured(seed) for seed in range(24)], view=1, geometry=(PROJECTIVE, (4, 4)))
    assert "views do not show what the followed calls of torchvision say" in drawn.refused
    _, later = fetch(transform, [textured()], view=2, geometry=(PROJECTIVE, (4, 4)))
    assert later.refused == drawn.refused


def test_images_that_tell_nothing_prove_nothing():
    grey = PIL.Image.new("RGB", (61, 45), (90, 90, 90))
    _, drawn = fetch(replayable([v1.RandomResizedCrop(SIZE)]), [grey] * 24, view=1, geometry=(PROJECTIVE, (4, 4)))
    assert "none of 24 views shows enough of its base view" in drawn.refused


def everything():
    return v1.Compose(
        [v1.RandomResizedCrop(SIZE), v1.RandomHorizontalFlip(), v1.ColorJitter(0.4), v1.RandAugment(), v1.ToTensor()]
    )


def test_following_changes_no_draw_and_no_generator():
    transform, images = replayable(everything()), [textured(seed) for seed in range(DRAWS)]
    before = random.getstate(), torch.get_rng_state()
    plain, _ = fetch(transform, images, view=1)
    followed, drawn = fetch(transform, images, view=1, geometry=(DENSE, (4, 4)))
    assert torch.equal(plain, followed) and len(drawn.geometries) == DRAWS
    assert before[0] == random.getstate() and torch.equal(before[1], torch.get_rng_state())


def test_used_alone_it_is_the_function():
    function, rows = of_rows(everything()), {"image": [textured(), textured(1)], "label": [3, 4]}
    torch.manual_seed(5)
    expected = function(dict(rows))
    transform = ReplayableTransform(train=function, base=of_rows([v1.Resize(GRID)]))
    torch.manual_seed(5)
    drawn = transform(dict(rows))
    assert drawn.keys() == expected.keys() and drawn["label"] == [3, 4]
    assert torch.equal(torch.stack(drawn["pixel_values"]), torch.stack(expected["pixel_values"]))


def watched_things():
    kernels = [kernel for kernels in _KERNEL_REGISTRY.values() for kernel in kernels.values()]
    names = [*vars(F).values(), *vars(v2.functional).values(), *vars(PIL.Image.Image).values()]
    return [id(thing) for thing in [*kernels, *names]]


def test_nothing_is_watched_when_no_function_runs():
    before = watched_things()
    fetch(replayable([v1.RandomCrop(SIZE)]), [textured()], view=1, geometry=(PROJECTIVE, (4, 4)))
    assert watched_things() == before

    def fails(image):
        assert watched_things() != before
        raise RuntimeError("of the function")

    calls = iter([everything(), fails])
    with pytest.raises(RuntimeError, match="of the function"):
        fetch(
            replayable(lambda image: next(calls)(image)), [textured()], view=1, geometry=(PROJECTIVE, (4, 4))
        )  # the first call tells that it takes rows
    assert watched_things() == before


def test_threads_that_draw_at_once_do_not_mix_their_grids():
    transforms = [replayable([v1.RandomResizedCrop(SIZE), v1.RandomHorizontalFlip()]) for _ in range(3)]
    images = [textured(seed) for seed in range(12)]

    def draw(transform):
        return torch.stack(fetch(transform, images, view=1, geometry=(PROJECTIVE, (4, 4)))[1].geometries)

    # One after the other: random numbers are those of the process, whose seeds threads would mix.
    expected = draw(transforms[0])
    image, grid = textured(), following.CoordinateGrid(torch.zeros(3, 45, 61))
    inside, release = threading.Event(), threading.Event()

    def hold():
        with following.follow(image, grid) as followed:
            inside.set()
            release.wait()
            kept = F.hflip(image)
            assert followed.grid_of(F.to_tensor(kept)).shape == grid.shape
            results.append(True)

    results = []
    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    assert torch.equal(draw(transforms[1]), expected)
    release.set()
    thread.join()
    assert results == [True] and torch.equal(draw(transforms[2]), expected)


def test_function_inside_another_is_followed_alone():
    inner = replayable([v1.RandomHorizontalFlip(1.0), v1.Resize(GRID)])

    def nested(image):
        fetch(inner, [image], view=1, geometry=(PROJECTIVE, (4, 4)))
        return F.to_tensor(F.resize(image, GRID))

    _, drawn = fetch(replayable(nested), [textured()], view=1, geometry=(PROJECTIVE, (4, 4)))
    assert drawn.refused is None and torch.allclose(drawn.geometries[0], torch.eye(3).flatten()[:8], atol=1e-3)


def test_random_base_function_is_an_error():
    transform = ReplayableTransform(of_rows([v1.RandomCrop(SIZE)]), of_rows([v1.RandomCrop(SIZE)]))
    with pytest.raises(ValueError, match="`base` draws random numbers"):
        fetch(transform, [textured()], view=0)


def test_callables_of_two_kinds_are_an_error():
    with pytest.raises(ValueError, match="`train` is a function of rows and `base` is a pipeline that takes an image"):
        fetch(ReplayableTransform(of_rows([]), v2.Compose(END[v2])), [textured()], view=1)


def test_function_that_fails_for_rows_and_images_says_both():
    def broken(rows):
        return rows["no such column"]

    with pytest.raises(ValueError, match="`train` takes neither a dict of columns .*no such column.* nor an image"):
        fetch(ReplayableTransform(broken, broken), [textured()], view=1)


def test_function_of_images_says_in_the_log_why_it_is_none_of_rows(caplog):
    caplog.set_level("DEBUG", logger="hf_freezecache")
    logging.getLogger("hf_freezecache").propagate = True
    pipeline = v1.Compose(END[v1])
    fetch(ReplayableTransform(lambda image: pipeline(image), pipeline), [textured()], view=0)
    (told,) = (record for record in caplog.records if "takes an image, not a dict of columns" in record.message)
    assert told.exc_info is not None


def test_function_that_returns_more_rows_is_an_error():
    def twice(rows):
        return {"pixel_values": [F.to_tensor(image) for image in rows["image"] for _ in range(2)]}

    with pytest.raises(ValueError, match="one row for each row, got {'pixel_values': 2}"):
        fetch(ReplayableTransform(twice, twice), [textured()], view=1)


def test_stacked_pixels_are_recognized():
    def stacked(rows):
        crops = [F.to_tensor(v1.RandomCrop(SIZE)(image)) for image in rows["image"]]
        return {"pixel_values": torch.stack(crops)}

    transform = ReplayableTransform(stacked, of_rows([]))
    assert fetch(transform, [textured()], view=1, geometry=(PROJECTIVE, (4, 4)))[1].refused is None


class MovesImagesAlone(v2.Transform):
    """A transform of the user's that forgets masks."""

    _transformed_types = (tv_tensors.Image,)

    def transform(self, inpt, params):
        return inpt.flip(2) if random.random() < 0.5 else inpt


class Brightens(MovesImagesAlone):
    """Leaves masks alone as it should."""

    def transform(self, inpt, params):
        return inpt * random.uniform(0.5, 1.5)


@pytest.mark.parametrize(("own", "is_refused"), [(MovesImagesAlone(), True), (Brightens(), False)])
def test_a_pipeline_that_moves_images_and_leaves_masks_is_found_by_the_proof(own, is_refused):
    pixels = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    crop = v2.RandomResizedCrop(GRID, scale=(0.5, 1.0))
    transform = ReplayableTransform(
        train=v2.Compose([*pixels, crop, own]), base=v2.Compose([v2.Resize(GRID), *pixels])
    )
    images = [textured(seed) for seed in range(24)]
    _, drawn = fetch(transform, images, view=1, geometry=(PROJECTIVE, (4, 4)))
    if is_refused:
        assert "moves the pixels of images alone" in drawn.refused
    else:
        assert drawn.refused is None
