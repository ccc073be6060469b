"""Rows that a global generator changes, and a source of them."""

import random

import numpy as np
import pytest
import torch

from hf_freezecache.cache.rows import RowSource
from support.builds import Rows, collate


class Noisy(Rows):
    """Adds noise from one of the global generators."""

    def __init__(self, draw, rows=22):
        super().__init__(rows)
        self.draw = draw

    def __getitem__(self, row):
        sample = super().__getitem__(row)
        sample["pixel_values"] += self.draw()
        return sample


def torch_draw():
    return torch.randn(()).item()


def numpy_draw():
    return np.random.randn()


def python_draw():
    return random.gauss(0, 1)


DRAWS = pytest.mark.parametrize("draw", [torch_draw, numpy_draw, python_draw])


def source(dataset=None, **settings):
    return RowSource(
        Rows() if dataset is None else dataset, **{"collator": collate, "batch_size": 4, "seed": 3, **settings}
    )
