"""The order in which nodes read their shares, against what accelerate's loaders make of it."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, SeedableRandomSampler
from support.builds import Rows, build, collate, make_spec
from support.helpers import tiny_vit
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler, WeightedRandomSampler

from hf_freezecache.build.feature_sources import ImageFeatures
from hf_freezecache.build.materialize import materialize
from hf_freezecache.cache.rows import ChosenRows, RowSource
from hf_freezecache.cache.shares import SHARE, Share, share_rows
from hf_freezecache.cache.store import StoreError
from hf_freezecache.distributed import Group
from hf_freezecache.nodes import NODE, Nodes, _own_name
from hf_freezecache.replay.dataset import ReplayDataset
from hf_freezecache.replay.node_order import Dealing, Filler, OrderError
from hf_freezecache.replay.requests import RowOrigin, SourceSwitch

NODES = {"two of two": (0, 0, 1, 1), "uneven": (0, 1, 1), "one each": (0, 1), "interleaved": (0, 1, 0, 1)}


def batches_of(rank, dealing, share, drawn, drop_last, even):
    """The batches that a process reads in an epoch."""
    order = list(dealing.order(drawn, share.places()))
    inner = BatchSampler(order, dealing.batch_size, drop_last)
    processes = len(dealing.nodes.of)
    return list(BatchSamplerShard(inner, processes, rank, split_batches=dealing.split, even_batches=even))


@pytest.mark.parametrize("of", NODES.values(), ids=NODES)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("rows", [13, 24, 50])
def test_rows_of_all_processes_are_every_row_once(of, split, rows):
    drawn = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).tolist()
    for drop_last, even in [(False, True), (False, False), (True, True)]:
        seen, lengths = [], set()
        for rank in range(len(of)):
            dealing = Dealing(Nodes(of, rank), 3 * len(of) if split else 3, split)
            counts = dealing.counts(rows)
            share = Share(counts, of[rank], seed=3, cut=2)
            batches = batches_of(rank, dealing, share, drawn, drop_last, even)
            assert {int(row) for batch in batches for row in batch} <= set(share.rows().tolist())
            seen += [row for batch in batches for row in batch if not isinstance(row, Filler)]
            lengths.add(len(batches))
            order = [row for row in dealing.order(drawn, share.places()) if not isinstance(row, Filler)]
            assert order == [row for row in drawn if row in set(share.rows().tolist())]  # as the sampler has drawn
        if even or drop_last:
            assert len(lengths) == 1
        if drop_last:
            assert len(set(seen)) == len(seen) <= rows
        else:
            assert set(seen) == set(range(rows)) and (even or len(seen) == rows)


def test_a_row_fills_up_a_batch_no_more_often_than_it_must():
    dealing = Dealing(Nodes((0, 0, 1, 1), 2), 4)
    share = Share(dealing.counts(50), 1, seed=3, cut=2)
    [*_, last] = batches_of(2, dealing, share, list(range(50)), False, True)
    assert len({int(row) for row in last}) == 4


def test_rows_are_dealt_anew_at_each_cut_and_are_all_rows_together():
    first, second = (Share((10, 14), node, seed=0, cut=2) for node in (0, 1))
    assert sorted([*first.rows(), *second.rows()]) == list(range(24))
    assert first.rows().tolist() != Share((10, 14), 0, seed=0, cut=3).rows().tolist()
    assert first.rows().tolist() != Share((10, 14), 0, seed=1, cut=2).rows().tolist()
    places = second.places()
    assert np.array_equal(np.flatnonzero(places >= 0), second.rows()) and places.max() == 13


def test_a_row_of_a_share_is_drawn_as_the_same_row_of_the_whole():
    from support.builds import Rows

    class Noisy(Rows):
        def __getitem__(self, row):
            return {"pixel_values": torch.rand(3), "labels": row}

    source = RowSource(Noisy(20), collate, 4, seed=5)
    share = Share((12, 8), 1, seed=5, cut=1)
    rows = share_rows(source, share)
    number = share.rows().tolist()[3]
    one, other = rows.collate([3]), source.collate([number])
    assert one["labels"].tolist() == [number] and torch.equal(one["pixel_values"], other["pixel_values"])
    chosen = ChosenRows(rows, [3])
    assert torch.equal(chosen.collate(chosen.rows(0))["pixel_values"], other["pixel_values"])


def test_store_of_a_share_is_read_by_the_row_numbers_of_the_whole(tmp_path):
    whole = build(tiny_vit(), tmp_path / "whole", codec="fp32")
    share = Share((12, 10), 1, seed=3, cut=2)
    spec = make_spec(tiny_vit(), tmp_path / "share", codec="fp32")
    rows = share_rows(spec.source, share)
    features = ImageFeatures(spec.chain, 2, rows, spec.layout, lambda batch: batch)
    made_from = {**spec.made_from, "rows": 10, SHARE: share.to_json()}
    spec = replace(spec, source=rows, feature_source=features, made_from=made_from)
    store = materialize(spec, Group()).spread(share)
    numbers = share.rows().tolist()[::-2]
    assert len(store) == 22 and store.manifest.rows == 10
    assert torch.allclose(store.read(numbers), whole.read(numbers), atol=1e-5)
    assert store.read_rows(numbers)["labels"].tolist() == whole.read_rows(numbers)["labels"].tolist()
    absent = next(row for row in range(22) if row not in share.rows())
    with pytest.raises(StoreError, match=f"row {absent} is not among the rows that this node stores"):
        store.read([absent])
    again = pickle.loads(pickle.dumps(store))
    assert again.share == share and torch.equal(again.read(numbers), store.read(numbers))
    assert torch.equal(store.packed.read([0]), store.read(share.rows()[:1]))
    dataset = ReplayDataset(Rows(22), SourceSwitch(22), 3)
    dataset._store = None
    assert dataset._open(store.path, replace(store.handle, key="of another process")).share == share


def loader(sampler, batch_size=4, processes=2):
    inner = BatchSampler(sampler, batch_size, drop_last=False)
    return DataLoaderShard(range(20), batch_sampler=BatchSamplerShard(inner, processes, 0))


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (SequentialSampler(range(20)), "SequentialSampler draws them otherwise"),
        (RandomSampler(range(20), replacement=True), "RandomSampler draws them otherwise"),
        (RandomSampler(range(20), num_samples=10), "RandomSampler draws them otherwise"),
        (WeightedRandomSampler([1.0] * 20, 20), "WeightedRandomSampler draws them otherwise"),
    ],
)
def test_sampler_that_does_not_draw_every_row_once_at_random_is_refused(sampler, message):
    with pytest.raises(OrderError, match=message):
        Dealing.of(loader(sampler), Nodes((0, 1), 0), 20)


def test_random_samplers_are_dealt():
    for sampler in (RandomSampler(range(20)), SeedableRandomSampler(range(20))):
        assert Dealing.of(loader(sampler), Nodes((0, 1), 0), 20).counts(20) == (12, 8)
    with pytest.raises(OrderError, match="leave a node without rows"):
        Dealing.of(loader(RandomSampler(range(3))), Nodes((0, 1), 0), 3)


def test_sampler_that_yields_other_rows_than_it_should_is_found_out():
    dealing = Dealing(Nodes((0, 1), 0), 2)
    with pytest.raises(OrderError, match="has not drawn every row"):
        list(dealing.order([0, 1, 1, 3], Share((2, 2), 0, 0, 1).places()))


def test_rows_that_fill_up_a_batch_are_not_counted_as_drawn():
    switch = SourceSwitch(4)
    assert switch.stamp(Filler(2)).occurrence == 0 and switch.stamp(2).occurrence == 0
    assert switch.stamp(2).occurrence == 1 and switch.stamp(Filler(2)).origin == RowOrigin()


def test_node_of_a_process_is_what_the_launcher_says():
    assert _own_name({"GROUP_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, 0) == "group 1"
    assert [_own_name({"LOCAL_WORLD_SIZE": "2"}, rank) for rank in range(4)] == [
        "group 0",
        "group 0",
        "group 1",
        "group 1",
    ]
    assert _own_name({"GROUP_RANK": "1", NODE: "mine"}, 0) == "mine"
    assert _own_name({}, 0) is None
