"""How many views does the proof of a followed function's geometry call wrong, for right and for wrong geometries?

A right function does all that moves pixels by torchvision. A wrong one moves them in place besides, which is not
followed.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F
from torchvision import transforms as v1
from torchvision.transforms.functional import rotate, to_pil_image, to_tensor

from hf_freezecache import ReplayableTransform
from hf_freezecache.augment.agreement import GeometryProof
from hf_freezecache.augment.draws import Draw, use_draw
from hf_freezecache.augment.geometry import PROJECTIVE

from .._common import Claim, make_parser, pick, prepare, write_result
from .._images import load_caltech_files, load_cifar10

END = [v1.ToTensor(), v1.Normalize([0.5] * 3, [0.25] * 3)]


class Counts(GeometryProof):
    """Compares all views, whatever it finds."""

    wants_more = True

    def add(self, *args: torch.Tensor) -> None:
        super().add(*args)
        self.refused = None


def right_functions(size: int) -> dict[str, list[Any]]:
    crop, flip = v1.RandomResizedCrop(size), v1.RandomHorizontalFlip()
    return {
        "resized crop and flip": [crop, flip],
        "colour jitter": [crop, flip, v1.ColorJitter(0.5, 0.5, 0.5, 0.3)],
        "padded crop": [v1.Resize(size), v1.CenterCrop(size), v1.RandomCrop(size, padding=size // 8), flip],
        "rotation": [crop, v1.RandomRotation(40)],
        "affine": [v1.Resize((size, size)), v1.RandomAffine(20, (0.2, 0.2), (0.7, 1.3), 15)],
        "perspective": [crop, v1.RandomPerspective(0.5, p=1)],
        "grey and blur": [crop, v1.RandomGrayscale(0.5), v1.GaussianBlur(5)],
        "solarized": [crop, v1.RandomSolarize(128, 1)],
        "inverted, posterized, equalized": [crop, v1.RandomInvert(), v1.RandomPosterize(3), v1.RandomEqualize()],
        "RandAugment": [crop, flip, v1.RandAugment()],
        "TrivialAugment": [crop, flip, v1.TrivialAugmentWide()],
        "crops of 2 to 6 %": [v1.RandomResizedCrop(size, scale=(0.02, 0.06))],
    }


def wrong_moves(size: int) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    def crop(pixels: torch.Tensor) -> torch.Tensor:
        left, top = random.randrange(size // 3), random.randrange(size // 3)
        part = pixels[None, :, top : top + size // 2, left : left + size // 2]
        return F.interpolate(part, (size, size), mode="bilinear")[0]

    def shift(pixels: torch.Tensor) -> torch.Tensor:
        return pixels.roll(random.randint(-size // 8, size // 8), 2)

    edge = size // 8
    return {
        "mirrored": lambda pixels: pixels.flip(2),
        "half of them mirrored": lambda pixels: pixels.flip(2) if random.random() < 0.5 else pixels,
        "shifted by a sixteenth": lambda pixels: pixels.roll((size // 16, size // 16), (1, 2)),
        "shifted by up to an eighth": shift,
        "cropped": crop,
        "enlarged by a third": lambda pixels: F.interpolate(
            pixels[None, :, edge:-edge, edge:-edge], (size, size), mode="bilinear"
        )[0],
        "turned by 10 degrees": lambda pixels: to_tensor(rotate(to_pil_image(pixels), 10)),
        "transposed": lambda pixels: pixels.transpose(1, 2),
    }


def of_rows(steps: list[Any], move: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Callable:
    pipeline = v1.Compose([*steps, *END])

    def function(rows: dict[str, list]) -> dict[str, list]:
        pixels = [pipeline(image.convert("RGB")) for image in rows["image"]]
        if move is not None:
            for each in pixels:
                each.copy_(move(each.sub(each.min()).div_(8)).clone())
        return {"pixel_values": pixels}

    return function


def count(train: Callable, size: int, images: list[Image.Image], seed: int) -> dict[str, float]:
    base = of_rows([v1.Resize(size), v1.CenterCrop(size)])
    transform = ReplayableTransform(train=train, base=base)
    counts = transform._proof = Counts()
    draw = Draw(seed, range(len(images)), view=1, geometry=(PROJECTIVE, (4, 4)))
    with use_draw(draw):
        transform({"image": images})
    if draw.refused is not None:
        raise RuntimeError(f"not followed: {draw.refused}")
    return {
        "views": len(images),
        "judged": counts.judged,
        "wrong": counts.wrong / max(1, counts.judged),
        "clearly": counts._clearly / max(1, counts.judged),
    }


def measure(images: list[Image.Image], size: int, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    crop = [v1.RandomResizedCrop(size), v1.RandomHorizontalFlip()]
    return {
        "right": {name: count(of_rows(steps), size, images, seed) for name, steps in right_functions(size).items()},
        "wrong": {name: count(of_rows(crop, move), size, images, seed) for name, move in wrong_moves(size).items()},
    }


def parse_options() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=120, help="images of each data set")
    options = parser.parse_args()
    if options.smoke:
        options.rows = 24
    return options


def main() -> None:
    options = parse_options()
    prepare(options)
    caltech = list(load_caltech_files(options, "train", options.rows)["image"])
    cifar = list(load_cifar10(options, "train", options.rows)["image"])
    results = {
        "CIFAR-10, 32 px": measure(cifar, 32, options.seed),
        "Caltech-101, 64 px": measure(caltech, 64, options.seed),
        "Caltech-101, 224 px": measure(caltech, 224, options.seed),
    }
    shares = {
        kind: [each["wrong"] for result in results.values() for each in result[kind].values()]
        for kind in ("right", "wrong")
    }
    claims = [
        Claim("largest share of views that disagree, right geometries", max(shares["right"]), at_most=0.12),
        Claim("smallest share of views that disagree, wrong geometries", min(shares["wrong"]), at_least=0.12),
    ]
    write_result("geometry_proof", options, pick(options, "rows"), results, claims)


if __name__ == "__main__":
    main()
