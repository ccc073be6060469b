"""Selections of rows of a data set, and of a store."""

import pickle

import numpy as np
import pytest
import torch
from support.helpers import pixel_dataset
from torch.utils.data import Subset

from hf_freezecache.cache.fingerprint import dataset_inputs
from hf_freezecache.cache.rows import RowSource
from hf_freezecache.cache.selections import selection_of


def described(dataset):
    return dataset_inputs(RowSource(dataset, list, 4, 0))


@pytest.mark.parametrize(
    "select",
    [
        lambda table: table.select([5, 1, 1, 19]),
        lambda table: table.shuffle(seed=1),
        lambda table: table.filter(lambda row: row["labels"] > 1),
        lambda table: table.train_test_split(0.3, seed=1)["train"],
        lambda table: table.sort("labels").select([3, 2, 9]),
        lambda table: Subset(table, [5, 1, 19]),
        lambda table: Subset(table.shuffle(seed=1), [5, 1, 19]),
        lambda table: Subset(Subset(table, range(10)), [5, 1]),
    ],
)
def test_rows_of_the_whole_are_those_of_the_selection(select):
    table = pixel_dataset(20)
    chosen = select(table)
    found = selection_of(chosen)
    assert found is not None and len(found.rows) == len(chosen) and len(found.whole) == len(table)
    for place, row in enumerate(found.rows.tolist()):
        assert torch.equal(found.whole[row]["pixel_values"], chosen[place]["pixel_values"])
    assert described(found.whole) == described(table) != described(chosen)


def test_whole_keeps_the_format_and_the_transform():
    table = pixel_dataset(20).with_format(None)
    transformed = table.with_transform(lambda rows: {"doubled": [2 * label for label in rows["labels"]]})
    found = selection_of(transformed.select([4, 2]))
    assert found.whole[4] == transformed[4]
    chosen = table.with_format("numpy", columns=["labels"]).select([4, 2])
    assert selection_of(chosen).whole[4] == {"labels": table[4]["labels"]}


def test_data_sets_that_are_no_selections():
    class Weighted(Subset):
        def __getitem__(self, index):
            return super().__getitem__(-index)

        def __getitems__(self, indices):
            return [self[index] for index in indices]

    table = pixel_dataset(20)
    assert selection_of(table) is None
    assert selection_of(table.map(lambda row: row)) is None
    assert selection_of([1, 2]) is None
    assert selection_of(Weighted(table, [1, 2])) is None


def test_selected_rows_of_a_store(built):
    chosen = built.select([21, 3, 3, 8])
    assert len(chosen) == 4 and len(built) == 22 and chosen.is_selection and not built.is_selection
    assert torch.equal(chosen.read([0, 3, 1]), built.read([21, 8, 3]))
    rows, expected = chosen.read_rows([2, 0]), built.read_rows([3, 21])
    assert rows.keys() == expected.keys()
    assert all(np.array_equal(rows[name], expected[name]) for name in rows)
    column = built.manifest.inputs["labels"]
    assert torch.equal(chosen.read_input("labels", column, [0]), built.read_input("labels", column, [21]))
    assert torch.equal(chosen.read_codes(["base"], [0])["base"], built.read_codes(["base"], [21])["base"])
    assert torch.equal(chosen.select([3, 0]).read([0]), built.read([8]))
    assert torch.equal(pickle.loads(pickle.dumps(chosen)).read([0]), built.read([21]))


@pytest.mark.parametrize("rows", [[4], [-1]])
def test_row_that_is_not_selected_does_not_exist(built, rows):
    with pytest.raises(IndexError, match="which has 4"):
        built.select([21, 3, 3, 8]).read(rows)
    with pytest.raises(IndexError):
        built.select([22])
