"""The user's samples as model inputs."""

import random

import datasets
import numpy as np
import pytest
import torch
from support.builds import Rows
from support.noisy_rows import DRAWS, Noisy, source

from hf_freezecache.build.survey import survey
from hf_freezecache.cache.rows import InputColumn, RowError, RowSource, fetch, split_batch


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_ranges_cover_every_row_once_in_order():
    rows = source(Rows(22))
    assert rows.num_ranges == 6
    assert [row for number in range(6) for row in rows.rows(number)] == list(range(22))
    assert list(rows.rows(5)) == [20, 21]
    assert source(Rows(20)).num_ranges == 5


@DRAWS
def test_draws_depend_on_seed_and_row_alone(draw):
    dataset = Noisy(draw)
    first = source(dataset).collate(range(4, 8))
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    assert same(source(dataset).collate(range(4, 8)), first)
    assert not same(source(dataset, seed=4).collate(range(4, 8)), first)
    assert not torch.equal(
        source(dataset).collate(range(4))["pixel_values"][0] - Rows()[0]["pixel_values"],
        first["pixel_values"][0] - Rows()[4]["pixel_values"],
    )


@DRAWS
def test_loader_draws_do_not_depend_on_workers_nor_on_the_share(draw):
    dataset = Noisy(draw)
    alone = {number: [view.batch for view in views] for number, views in source(dataset).loader(range(6), views=2)}
    with_workers = list(source(dataset, num_workers=2).loader(range(6), views=2))
    assert [number for number, _ in with_workers] == list(range(6))
    assert all(not same(first, second) for first, second, _ in alone.values())
    for number, views in [*with_workers, *source(dataset).loader([4, 5], views=2)]:
        assert all(same(view.batch, batch) for view, batch in zip(views, alone[number], strict=True))


@DRAWS
@pytest.mark.parametrize("workers", [0, 2])
def test_reading_leaves_generators_alone(draw, workers):
    before = states()
    rows = source(Noisy(draw), num_workers=workers)
    rows.probe()
    survey(rows, "pixel_values")
    list(rows.loader(range(6)))
    rows.collate(range(3))
    assert states() == before


def test_probe_of_a_single_row_data_set_is_that_row():
    assert len(source(Rows(1)).probe()["pixel_values"]) == 1
    assert len(source(Rows(5)).probe()["pixel_values"]) == 2


def test_fetch_prefers_getitems():
    dataset = datasets.Dataset.from_dict({"x": [1, 2, 3]})
    assert fetch(dataset, [2, 0]) == [{"x": 3}, {"x": 1}]
    assert fetch([10, 20, 30], range(2)) == [10, 20]


# What of a batch belongs to a row


def batch(**entries):
    return {"pixel_values": torch.zeros(3, 2), **entries}


def test_split_takes_rows_and_constants_apart():
    split = split_batch(
        batch(
            labels=torch.arange(3),
            names=["a", "b", "c"],
            weights=(0.1, 0.2, 0.3),
            return_loss=True,
            scale=2.0,
            no=None,
        ),
        "pixel_values",
    )
    assert split.columns.keys() == {"labels", "names", "weights"}
    assert split.constants == {"return_loss": True, "scale": 2.0, "no": None}
    assert split.describe() == {
        "labels": InputColumn("int64", ()),
        "names": InputColumn("str", is_list=True),
        "weights": InputColumn("float", is_list=True),
    }


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"labels": torch.zeros(2)}, "'labels'.*one value per sample"),
        ({"scale": torch.tensor(1.0)}, "'scale'"),
        ({"boxes": [torch.zeros(1), torch.zeros(2), torch.zeros(3)]}, "'boxes'.*list"),
        ({"mixed": ["a", 1, None]}, "'mixed'"),
        ({"short": ["a", "b"]}, "'short'"),
        ({"nested": {"a": torch.zeros(3)}}, "'nested'.*dict"),
        ({"wave": torch.zeros(3, dtype=torch.complex64)}, "'wave'.*complex64"),
    ],
)
def test_entry_that_cannot_be_kept_is_named(entries, message):
    with pytest.raises(RowError, match=message):
        split_batch(batch(**entries), "pixel_values")


@pytest.mark.parametrize("value", [[torch.zeros(3)], (torch.zeros(3),), torch.zeros(3), None])
def test_collator_that_returns_no_dict_is_refused(value):
    with pytest.raises(RowError, match="must return a dict with the tensor 'pixel_values'"):
        split_batch(value, "pixel_values")


def test_batch_without_the_main_input_is_refused():
    with pytest.raises(RowError, match=r"'pixel_values'.*\['images'\]"):
        split_batch({"images": torch.zeros(3)}, "pixel_values")
    with pytest.raises(RowError, match="pixel_values"):
        split_batch({"pixel_values": np.zeros(3)}, "pixel_values")


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 2)])
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float64]
)
def test_column_survives_storing(dtype, shape):
    value = (torch.randn(5, *shape) * 3).to(dtype)
    column = InputColumn(str(dtype).removeprefix("torch."), shape)
    stored = column.to_numpy(value)
    assert stored.dtype == column.stored_as and len(stored) == 5
    found = column.to_tensor(stored)
    assert found.dtype == dtype and torch.equal(found, value)


def test_single_row_batch_keeps_constants_out_of_the_columns():
    """With one row, a list of one number is the row's; a plain number stays a constant."""
    split = split_batch({"pixel_values": torch.zeros(1, 2), "names": ["a"], "scale": 1.5}, "pixel_values")
    assert split.columns == {"names": ["a"]} and split.constants == {"scale": 1.5}


def test_collating_in_a_forked_loader_never_asks_the_gpu(monkeypatch):
    def in_bad_fork():
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", in_bad_fork)
    source = RowSource(range(8), lambda rows: {"pixel_values": torch.rand(len(rows))}, batch_size=4, seed=0)
    assert torch.equal(source.collate([0, 1])["pixel_values"], source.collate([0, 1])["pixel_values"])
