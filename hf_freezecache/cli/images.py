"""Loads images with labels and an image classifier for them, as `freezecache plan` and the recipes do."""

from __future__ import annotations

import glob
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
)


def load_images(paths: Sequence[str]) -> Dataset:
    """Loads images from parquet files, from WebDataset shards, or from a folder with one folder of images per class.

    Args:
        paths: files (patterns and URLs are allowed), parquet or tar archives of `<key>.jpg` and `<key>.cls`; or one
            folder.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: if there are files of both kinds, or a folder and something else.
    """
    for path in paths:
        if "://" not in path and not Path(path).exists() and not glob.glob(path):
            raise FileNotFoundError(f"{path} does not exist.")
    if not any(Path(path).is_dir() for path in paths):
        archives = [path for path in paths if path.endswith((".tar", ".tar.gz"))]
        if archives and len(archives) < len(paths):
            raise ValueError(f"images come from parquet files or from tar archives, not from both: {' '.join(paths)}")
        return load_dataset("webdataset" if archives else "parquet", data_files=list(paths), split="train")
    if len(paths) > 1:
        raise ValueError(f"images come from one folder, or from files, not from {' '.join(paths)}")
    return load_dataset("imagefolder", data_dir=paths[0], split="train")


def find_columns(dataset: Dataset, image_column: str | None, label_column: str | None) -> tuple[str, str]:
    """Returns the names of the columns with images and with labels, finding those that are None.

    The image column is the first one of type `Image`; the label column is the first `ClassLabel`, or else `label`,
    `labels` or `cls` (of WebDataset).

    Raises:
        ValueError: if there is no such column.
    """
    features = dataset.features
    if image_column is None:
        image_column = next((name for name, kind in features.items() if isinstance(kind, Image)), None)
    if label_column is None:
        classes = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
        label_column = next(iter([*classes, *(name for name in ("label", "labels", "cls") if name in features)]), None)
    return _check_column("image", image_column, features), _check_column("label", label_column, features)


def _check_column(kind: str, column: str | None, features: Mapping[str, Any]) -> str:
    names = ", ".join(features)
    if column is None:
        raise ValueError(f"no column of the {kind}s among {names}: name it with --{kind}-column")
    if column not in features:
        raise ValueError(f"--{kind}-column: no column {column!r} among {names}")
    return column


def encode_labels(splits: DatasetDict, label_column: str) -> DatasetDict:
    """Makes the labels class numbers that mean the same in every split.

    Splits whose column is the same `ClassLabel` stay as they are. Others get a `ClassLabel` with the names of all
    splits, whole numbers in their order, other labels sorted as text. Images are not copied.
    """
    kinds = {name: split.features[label_column] for name, split in splits.items()}
    first = next(iter(kinds.values()))
    if isinstance(first, ClassLabel) and all(kind == first for kind in kinds.values()):
        return splits
    names: set[str] = set()
    for name, kind in kinds.items():
        names |= set(kind.names if isinstance(kind, ClassLabel) else map(str, splits[name].unique(label_column)))
    # Numbers of classes keep their order: those of ImageNet in WebDataset's shards are the model's own.
    numbered = all(name.isdecimal() for name in names)
    encoder = ClassLabel(names=sorted(names, key=lambda name: (int(name) if numbered else 0, name)))

    def encode(split: Dataset, kind: Any) -> Dataset:
        to_text = kind.int2str if isinstance(kind, ClassLabel) else str
        numbers = [encoder.str2int(to_text(label)) for label in split[label_column]]
        encoded = split.remove_columns(label_column).add_column(label_column, numbers, feature=encoder)
        return encoded.select_columns(split.column_names)

    return DatasetDict({name: encode(split, kinds[name]) for name, split in splits.items()})


def load_classifier(
    name: str, classes: Sequence[str], image_size: int | None = None, pretrained: bool = True
) -> tuple[PreTrainedModel, BaseImageProcessor, dict[str, Any]]:
    """Loads an image classifier with a head for these classes, which is a fresh one if their number differs.

    Args:
        name: folder or hub id.
        classes: their names; a label is an index into them.
        image_size: side of the images; None: the model's own.
        pretrained: False: the weights are drawn, by torch's generator; only config and processor are read.

    Returns:
        Model, processor, and model inputs that are the same in every batch: a model for images of another size has to
        interpolate its position embeddings.
    """
    numbers = {label: number for number, label in enumerate(classes)}
    config = AutoConfig.from_pretrained(name, id2label=dict(enumerate(classes)), label2id=numbers)
    if pretrained:
        model = AutoModelForImageClassification.from_pretrained(name, config=config, ignore_mismatched_sizes=True)
    else:
        model = AutoModelForImageClassification.from_config(config)
    other_size = image_size is not None and image_size != getattr(config, "image_size", None)
    can_interpolate = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    constants = {"interpolate_pos_encoding": True} if other_size and can_interpolate else {}
    return model, AutoImageProcessor.from_pretrained(name), constants


@dataclass(frozen=True)
class ImageCollator:
    """Stacks rows of pixels and class numbers to a batch.

    Args:
        label_column: name of the column with the class numbers.
        constants: model inputs that are the same in every batch.
    """

    label_column: str
    constants: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        labels = torch.tensor([row[self.label_column] for row in rows])
        return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": labels, **self.constants}
