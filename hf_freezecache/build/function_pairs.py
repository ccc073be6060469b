"""Whether the transforms of the train and the evaluation data are a pair that `ReplayableTransform` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import datasets
from transformers.utils import logging

from ..augment.drawing import PIXELS
from ..distributed import Announcer
from ..rng import preserve_rng

logger = logging.get_logger(__name__)


def suggest_replayable(train: Any, evaluation: Any) -> str | None:
    """The `ReplayableTransform` of two data sets' functions of rows, as the line to write.

    Args:
        train: data set, with a transform that is random.
        evaluation: data set, or several by name of which the first counts; None: there is none.

    Returns:
        The line; None if a transform is no function of rows, or the two do not read the same image column.
    """
    if isinstance(evaluation, Mapping) and not isinstance(evaluation, datasets.Dataset):
        evaluation = next(iter(evaluation.values()), None)
    functions = transform_of(train), transform_of(evaluation)
    if functions[0] is None or functions[1] is None or functions[0] is functions[1]:
        return None
    columns = _image_columns(train) & _image_columns(evaluation)
    if len(columns) != 1 or not len(evaluation):
        return None
    with preserve_rng():
        try:
            makes_pixels = all(PIXELS in dataset[0] for dataset in (train, evaluation))
        except Exception as error:  # whatever a transform raises for rows that nobody has asked for
            Announcer.survived(logger, "No ReplayableTransform is suggested", error)
            return None
    if not makes_pixels:
        return None
    (column,) = columns
    names = [getattr(function, "__name__", "...").replace("<lambda>", "...") for function in functions]
    named = "" if column == "image" else f', image_column="{column}"'
    return f"ReplayableTransform(train={names[0]}, base={names[1]}{named})"


def transform_of(dataset: Any) -> Callable | None:
    """What a data set was given by `with_transform` or `set_transform`; None if nothing."""
    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] != "custom":
        return None
    return dataset.format["format_kwargs"].get("transform")


def _image_columns(dataset: datasets.Dataset) -> set[str]:
    return {name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)}
