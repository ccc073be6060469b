"""Rows that stand for a data set: every source, every class, the ends."""

import datasets
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from hf_freezecache.build.spread_rows import class_of_rows, in_batches, spread_rows


class Folder(torch.utils.data.Dataset):
    """As torchvision's image folders; its samples must not be read."""

    def __init__(self, classes):
        self.samples = [(f"{number}.png", label) for number, label in enumerate(classes)]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, row):
        raise AssertionError("a sample was read")


CLASSES = [0] * 300 + [1] * 2 + [2] * 300 + [3] * 398


def hf_dataset(name="labels", feature=None):
    features = datasets.Features({name: feature or datasets.Value("int64"), "x": datasets.Value("float32")})
    return datasets.Dataset.from_dict({name: CLASSES, "x": [0.0] * len(CLASSES)}, features=features)


def with_attribute(name, values):
    dataset = TensorDataset(torch.zeros(len(CLASSES)))
    setattr(dataset, name, values)
    return dataset


@pytest.mark.parametrize(
    "dataset",
    [
        Folder(CLASSES),
        hf_dataset().with_transform(lambda rows: 1 / 0),
        hf_dataset("kind", datasets.ClassLabel(4)),
        hf_dataset("label").with_format("torch"),
        with_attribute("targets", torch.tensor(CLASSES)),
        with_attribute("targets", CLASSES),
        with_attribute("labels", torch.tensor(CLASSES).numpy()),
        Subset(Folder(CLASSES[::-1]), range(999, -1, -1)),
        ConcatDataset([Folder(CLASSES[:500]), Subset(Folder(CLASSES), range(500, 1000))]),
    ],
)
def test_every_class_is_among_the_rows(dataset):
    assert class_of_rows(dataset).tolist() == CLASSES
    for seed in range(3):
        rows = spread_rows(dataset, 12, seed)
        assert {CLASSES[row] for row in rows} == {0, 1, 2, 3}
        assert len(set(rows)) == len(rows) == 12 and {0, 999} <= set(rows)


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.zeros(50)),
        hf_dataset("text", datasets.Value("int64")),
        with_attribute("targets", ["cat", "dog"] * 500),
        with_attribute("targets", CLASSES[:10]),
        with_attribute("labels", torch.rand(1000)),
        with_attribute("labels", lambda: None),
    ],
)
def test_classes_that_are_not_cheap_to_know_are_not_looked_for(dataset):
    assert class_of_rows(dataset) is None
    assert len(spread_rows(dataset, 12, 0)) == 12


def test_every_source_is_among_the_rows():
    parts = [TensorDataset(torch.zeros(size)) for size in (100, 1, 300)]
    rows = spread_rows(ConcatDataset([*parts, ConcatDataset(parts)]), 12, 0)
    assert {0, 100, 101, 401, 501, 502, 801} <= set(rows)


def test_rows_are_at_random_and_repeatable():
    dataset = TensorDataset(torch.zeros(1000))
    assert spread_rows(dataset, 20, 3) == spread_rows(dataset, 20, 3) != spread_rows(dataset, 20, 4)
    assert sorted(spread_rows(TensorDataset(torch.zeros(7)), 20, 3)) == list(range(7))


def test_more_classes_than_rows_leave_some_out():
    rows = spread_rows(with_attribute("targets", list(range(1000))), 12, 0)
    assert len(set(rows)) == 12


def test_batches_have_one_size():
    assert in_batches([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4]]
    assert in_batches([1], 2) == [[1]]
