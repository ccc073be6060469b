"""Ranges of rows of a data set that carry no row numbers: which rows of which table they are."""

import os

import datasets
import numpy as np
import PIL.Image
import pytest
from support.helpers import pixel_dataset
from torch.utils.data import Subset

from hf_freezecache.cache import selections, value_digest
from hf_freezecache.cache.fingerprint import dataset_inputs
from hf_freezecache.cache.rows import RowSource
from hf_freezecache.cache.selections import selection_of, why_unknown

ROWS = 50


def described(dataset):
    return dataset_inputs(RowSource(dataset, list, 4, 0))


def every_kind():
    """Columns of every type of which it is known where they were cut."""
    rows = range(ROWS)
    columns = {
        "labels": list(rows),
        "text": ["a" * row for row in rows],
        "nested": [{"a": row, "b": [row] * (row % 3)} for row in rows],
        "flag": [row % 3 == 0 for row in rows],
        "nothing": [None] * ROWS,
        "sometimes": [None if row % 4 else row for row in rows],
        "nan": [float("nan")] * ROWS,
        "bytes": [bytes([row]) for row in rows],
    }
    return datasets.Dataset.from_dict(columns)


def with_pairs():
    features = datasets.Features(v=datasets.List(datasets.Value("float32"), length=2), labels=datasets.Value("int64"))
    return datasets.Dataset.from_dict({"v": [[i, -i] for i in range(ROWS)], "labels": list(range(ROWS))}, features)


def pictures():
    features = datasets.Features(image=datasets.Image(), labels=datasets.Value("int64"))
    images = [PIL.Image.fromarray(np.full((4, 4, 3), row, np.uint8)) for row in range(ROWS)]
    return datasets.Dataset.from_dict({"image": images, "labels": list(range(ROWS))}, features)


def on_disk(folder, dataset=None, shards=3):
    (every_kind() if dataset is None else dataset).save_to_disk(folder, num_shards=shards)
    return datasets.load_from_disk(folder)


def assert_range(chosen, whole):
    found = selection_of(chosen)
    assert found is not None and found.is_proved and why_unknown(chosen) is None
    assert described(found.whole) == described(whole) != described(chosen)
    assert found.whole["labels"][:] == whole["labels"][:]
    assert [whole["labels"][row] for row in found.rows.tolist()] == chosen["labels"][:]
    assert found.whole.select(found.rows)[:].keys() == chosen[:].keys()
    return found


@pytest.mark.parametrize("make", [every_kind, with_pairs, pictures], ids=lambda make: make.__name__)
@pytest.mark.parametrize("first, last", [(0, 40), (7, 33), (13, ROWS)])
def test_range_in_memory_lies_in_the_memory_of_the_larger_table(make, first, last):
    assert_range(make().select(range(first, last)), make())


CUT = {
    "range": lambda table: (table.select(range(20, 40)), table),
    "first rows": lambda table: (table.select(range(2)), table),
    "split": lambda table: (table.train_test_split(0.2, shuffle=False)["test"], table),
    "columns dropped behind": lambda table: (
        table.select(range(9, 40)).remove_columns(["text", "nan"]),
        table.remove_columns(["text", "nan"]),
    ),
    "columns dropped before": lambda table: (
        table.remove_columns("text").select(range(9, 40)),
        table.remove_columns("text"),
    ),
    "renamed": lambda table: (
        table.select(range(9, 40)).rename_column("text", "t"),
        table.rename_column("text", "t"),
    ),
    "all but some": lambda table: (
        datasets.concatenate_datasets([table.select(range(8)), table.select(range(20, ROWS))]),
        table,
    ),
    "other order": lambda table: (
        datasets.concatenate_datasets([table.select(range(30, ROWS)), table.select(range(20))]),
        table,
    ),
}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("cut", CUT)
def test_range_of_files_is_one_of_all_of_their_rows(cut, shards, tmp_path):
    assert_range(*CUT[cut](on_disk(tmp_path, shards=shards)))


def test_range_of_a_range_is_one_of_the_last_that_was_cut(tmp_path):
    part = on_disk(tmp_path, shards=1).select(range(3, 30))
    assert_range(part.select(range(2, 9)), part)
    numbered = selection_of(part.select([4, 2]))
    assert (len(numbered.whole), numbered.rows.tolist()) == (27, [4, 2])
    subset = selection_of(Subset(part, [4, 2]))
    assert subset.whole is part


def test_tables_that_were_not_cut_are_no_selections(tmp_path):
    table, files = every_kind(), on_disk(tmp_path)
    for dataset in (table, files, table.select(range(ROWS)), files.select(range(ROWS))):
        assert selection_of(dataset) is None and why_unknown(dataset) is None
    mapped = files.select(range(9)).map(lambda row: row)
    assert selection_of(mapped) is None and why_unknown(mapped) is None


def test_missing_files_of_a_data_set_leave_those_that_the_range_touches(tmp_path):
    table = on_disk(tmp_path)
    chosen = table.select(range(20, 40))  # of the second and the third file
    os.remove(tmp_path / "data-00000-of-00003.arrow")
    assert len(selection_of(chosen).whole) == ROWS - len(table.data.blocks[0][0])


UNKNOWN = {
    "pieces": (lambda table, files: datasets.concatenate_datasets([table, table]).select(range(9, 70)), "2 pieces"),
    "range of several": (lambda table, files: files.select(range(2, 45)).select(range(1, 9)), "range of a range"),
    "column added": (lambda table, files: files.select(range(5)).add_column("y", [1] * 5), "columns were added"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_range_of_unknown_origin_says_why(kind, tmp_path):
    make, message = UNKNOWN[kind]
    chosen = make(every_kind(), on_disk(tmp_path))
    assert selection_of(chosen) is None and message in why_unknown(chosen)


@pytest.mark.parametrize("most", [None, 0])
def test_file_with_other_rows_than_were_mapped_proves_nothing(most, tmp_path, monkeypatch):
    if most is not None:
        monkeypatch.setattr(selections, "LARGEST_READ", most)
    table = on_disk(tmp_path / "one", shards=1)
    chosen = table.select(range(9, 40))
    assert selection_of(chosen).is_proved
    other = on_disk(tmp_path / "other", every_kind().map(lambda row: {"labels": row["labels"] + 1}), shards=1)
    os.replace(other.cache_files[0]["filename"], table.cache_files[0]["filename"])
    assert not selection_of(chosen).is_proved


def test_file_that_is_gone_says_so(tmp_path):
    table = on_disk(tmp_path, shards=1)
    chosen = table.select(range(9, 40))
    os.remove(table.cache_files[0]["filename"])
    assert selection_of(chosen) is None and "cannot be opened again" in why_unknown(chosen)


def test_ranges_of_a_large_file_are_told_apart(tmp_path, monkeypatch):
    """Large tables count by size and time of their files, which are the same for all ranges of one file."""
    monkeypatch.setattr(value_digest, "LARGEST_READ", 0)
    table = on_disk(tmp_path, pixel_dataset(ROWS), shards=1)
    first, second = table.select(range(25)), table.select(range(25, ROWS))
    assert described(first) != described(second)
    assert described(selection_of(first).whole) == described(selection_of(second).whole) == described(table)
