"""What is learned: all classes of a data set from a head start; ten from a new head, with one live block or none."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import Dataset

from .._images import Pixels, load_deit
from ..headline.tasks import Task, load_task
from ..text.sources import load_minilm

#: Classes of a small task: those with the first labels.
CLASSES = 10
HEAD_START, NEW_HEAD = "head start", "new head"


@dataclass(frozen=True)
class Learned:
    """A task of this benchmark.

    Args:
        name: in tables and files.
        start: with what all methods begin; some begin with the other one, too.
        half_decades: by how much the first learning rates of steps along random directions are larger than `RATES`.
        passes: forward passes of a training.
        load: reads the data; the features of the first `Task.deep` blocks are cached.
    """

    name: str
    start: str
    half_decades: int
    passes: int
    load: Callable[[argparse.Namespace], Task]

    @property
    def other_start(self) -> str:
        return NEW_HEAD if self.start == HEAD_START else HEAD_START


def _all_classes(name: str) -> Callable[[argparse.Namespace], Task]:
    return lambda options: load_task(name, options)


def _ten_images(name: str, live: int) -> Callable[[argparse.Namespace], Task]:
    def load(options: argparse.Namespace) -> Task:
        whole = load_task("caltech-112", options)
        return _with_few_classes(name, whole, live, lambda: load_deit(options, classes=CLASSES))

    return load


def _ten_intents(name: str, live: int) -> Callable[[argparse.Namespace], Task]:
    def load(options: argparse.Namespace) -> Task:
        # All questions are read: those of ten intents are an eighth of them.
        every = argparse.Namespace(**vars(options) | {"rows": options.rows or 10**9})
        whole = load_task("banking77", every)
        return _with_few_classes(name, whole, live, lambda: load_minilm(options, CLASSES)[0])

    return load


def _with_few_classes(name: str, task: Task, live: int, load_model: Callable[[], Any]) -> Task:
    """The same task with ten classes, and so many live blocks before the head."""
    parts = {"train": _first_classes(task.train), "test": _first_classes(task.test)}
    return replace(task, name=name, **parts, load_model=load_model, deep=task.blocks - live)


def _first_classes(dataset: Any) -> Dataset:
    """The samples of the first ten classes."""
    if isinstance(dataset, Pixels):
        chosen = dataset.labels < CLASSES
        return Pixels(dataset.pixel_values[chosen], dataset.labels[chosen])
    return dataset.select(torch.nonzero(torch.tensor(dataset["label"]) < CLASSES).flatten().tolist())


TASKS = {
    task.name: task
    for task in (
        Learned("caltech-224", HEAD_START, 0, 3000, _all_classes("caltech-224")),
        Learned("banking77", HEAD_START, 0, 3000, _all_classes("banking77")),
        Learned("caltech-112-ten", NEW_HEAD, 1, 2000, _ten_images("caltech-112-ten", 1)),
        Learned("banking77-ten", NEW_HEAD, 3, 2000, _ten_intents("banking77-ten", 1)),
        Learned("caltech-112-ten-head", NEW_HEAD, 2, 8000, _ten_images("caltech-112-ten-head", 0)),
        Learned("banking77-ten-head", NEW_HEAD, 4, 8000, _ten_intents("banking77-ten-head", 0)),
    )
}
