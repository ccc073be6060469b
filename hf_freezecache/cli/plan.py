"""`freezecache plan`: an image classifier and a folder of images as a trainer would get them."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Image, load_dataset
from torchvision.transforms import InterpolationMode, v2
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, TrainingArguments

from ..augment.transforms import ReplayableTransform
from ..config import FreezeCacheConfig
from ..estimate.costs import Plan
from ..planning import plan


@dataclass(frozen=True)
class _Stack:
    """Collates rows of pixels and labels.

    Args:
        label_column: its name.
        classes: label -> number.
        constants: model inputs that are the same for every batch.
    """

    label_column: str
    classes: Mapping[Any, int]
    constants: Mapping[str, Any]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        labels = torch.tensor([self.classes[row[self.label_column]] for row in rows])
        return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": labels, **self.constants}


def plan_images(options: argparse.Namespace) -> Plan:
    """The plan for what was said on the command line.

    Raises:
        ValueError: if an option is not possible; the message names it.
        OSError: if model or images are not there.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    dataset = _load(options.data)
    image_column, label_column = _find_columns(dataset, options)
    classes = {label: number for number, label in enumerate(sorted(dataset.unique(label_column)))}
    own = AutoConfig.from_pretrained(options.model)
    own.num_labels = len(classes)
    model = AutoModelForImageClassification.from_pretrained(options.model, config=own, ignore_mismatched_sizes=True)
    processor = AutoImageProcessor.from_pretrained(options.model)
    sides = _sides(processor) if options.image_size is None else (options.image_size, options.image_size)
    interpolated = options.image_size is not None and options.image_size != getattr(own, "image_size", None)
    can = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    constants = {"interpolate_pos_encoding": True} if interpolated and can else {}
    names = {"codec": "codec", "progressive": "progressive", "views": "views", "cache_dir": "feature_cache_dir"}
    settings = {field: getattr(options, name) for name, field in {**names, "budget": "cache_budget"}.items()}
    return plan(
        model,
        dataset.with_transform(_transform(processor, sides, options.augmentation, image_column)),
        FreezeCacheConfig(
            lossless=options.lossless, **{field: value for field, value in settings.items() if value is not None}
        ),
        args=TrainingArguments(
            output_dir=".",
            per_device_train_batch_size=options.batch_size,
            dataloader_num_workers=options.workers,
            remove_unused_columns=False,
            use_cpu=options.cpu,
            bf16=options.bf16,
            report_to="none",
        ),
        data_collator=_Stack(label_column, classes, constants),
        cuts=options.cuts,
        batches=options.batches,
    )


def _load(paths: Sequence[str]) -> Dataset:
    missing = [path for path in paths if not Path(path).exists() and not any(Path().glob(path))]
    if missing:
        raise FileNotFoundError(f"--data: {missing[0]} does not exist.")
    folders = [path for path in paths if Path(path).is_dir()]
    if not folders:
        return load_dataset("parquet", data_files=list(paths), split="train")
    if len(paths) > 1:
        raise ValueError(f"--data: give one folder, or parquet files alone, not {' '.join(paths)}")
    return load_dataset("imagefolder", data_dir=folders[0], split="train")


def _find_columns(dataset: Dataset, options: argparse.Namespace) -> tuple[str, str]:
    """Names of the columns with images and with labels."""
    kinds = dataset.features
    image = options.image_column or next((name for name, kind in kinds.items() if isinstance(kind, Image)), None)
    classes = [name for name, kind in kinds.items() if isinstance(kind, ClassLabel)]
    known = [name for name in ("label", "labels") if name in kinds]
    label = options.label_column or next(iter([*classes, *known]), None)
    for option, column in (("--image-column", image), ("--label-column", label)):
        if column not in kinds:
            raise ValueError(f"no column for {option} among {', '.join(kinds)}: name it.")
    return image, label


def _sides(processor: Any) -> tuple[int, int]:
    """Height and width of the images that the model takes."""
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    height, width, shortest = (
        size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)
        for name in ("height", "width", "shortest_edge")
    )
    return (height, width) if height else (shortest, shortest)


def _transform(processor: Any, sides: tuple[int, int], augmentation: str, image_column: str) -> ReplayableTransform:
    mode = InterpolationMode.BICUBIC if processor.resample == 3 else InterpolationMode.BILINEAR
    after = [v2.ToDtype(torch.float32, scale=True)]
    if processor.do_normalize:
        after.append(v2.Normalize(processor.image_mean, processor.image_std))
    base = v2.Compose([v2.ToImage(), v2.Resize(list(sides), mode, antialias=True), *after])
    crop = v2.RandomResizedCrop(list(sides), (0.35, 1.0), interpolation=mode)
    train = v2.Compose([v2.ToImage(), crop, v2.RandomHorizontalFlip(), *after])
    return ReplayableTransform(base if augmentation == "none" else train, base, image_column)
