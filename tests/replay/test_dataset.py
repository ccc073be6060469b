"""The switch between images and stores, the wrapped data set, and the views that it takes."""

import gc
import pickle

import numpy as np
import pytest
import torch
from support import zoo
from support.builds import NoItems, Rows, build, collate
from support.helpers import pixel_dataset, tiny_vit
from support.images import picture_dataset, replayable
from support.packed_stores import build_plain_and_packed
from support.view_trainings import train
from torch.utils.data import DataLoader

from hf_freezecache.augment.geometry import PROJECTIVE
from hf_freezecache.replay.collator import ReplayCollator, take_codes
from hf_freezecache.replay.dataset import (
    CachedRows,
    ReplayDataset,
    SourceSwitch,
    WriteRound,
    choose_views,
    rotate_views,
)

# The switch


def test_switch_starts_live_and_turns_both_ways(tmp_path):
    switch = SourceSwitch()
    assert switch.path is None
    switch.set(tmp_path / "käse")
    assert switch.path == tmp_path / "käse"
    switch.set(tmp_path)
    assert switch.path == tmp_path
    switch.set(None)
    assert switch.path is None


def test_switch_makes_relative_paths_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    switch = SourceSwitch()
    switch.set(tmp_path.relative_to(tmp_path) / "store")
    assert switch.path == tmp_path / "store"


def test_switch_refuses_a_path_that_does_not_fit(tmp_path):
    switch = SourceSwitch()
    with pytest.raises(ValueError, match="longer than"):
        switch.set(tmp_path / ("x" * 5000))
    assert switch.path is None


def test_switch_reaches_persistent_workers(store):
    dataset = ReplayDataset(Rows(), SourceSwitch(), seed=0)
    loader = DataLoader(
        dataset,
        batch_size=4,
        num_workers=2,
        persistent_workers=True,
        collate_fn=ReplayCollator(collate),
    )
    live = list(loader)
    assert not any(take_codes(batch) for batch in live)
    dataset.switch.set(store.path)
    replayed = list(loader)
    dataset.switch.set(None)
    again = list(loader)
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(live, again, strict=True))
    assert len(replayed) == len(live) == 6
    for number, batch in enumerate(replayed):
        codes, others = take_codes(batch)
        rows = range(4 * number, min(4 * number + 4, 22))
        assert torch.equal(store.codec.decode(codes), store.read(rows))
        assert torch.equal(others["labels"], live[number]["labels"])
    del loader
    gc.collect()


# The data set


def test_wrapped_data_set_has_the_length_and_samples_of_the_inner_one():
    inner = pixel_dataset(10)
    dataset = ReplayDataset(inner, SourceSwitch(), seed=0)
    assert len(dataset) == 10
    assert torch.equal(dataset[3]["pixel_values"], inner[3]["pixel_values"])
    many = dataset.__getitems__([7, 0, 7])
    assert [sample["labels"].item() for sample in many] == [inner[row]["labels"].item() for row in (7, 0, 7)]


def test_replay_reads_rows_in_the_order_asked_for_and_no_live_sample(store):
    dataset = ReplayDataset(NoItems(), SourceSwitch(), seed=0)
    dataset.switch.set(store.path)
    assert len(dataset) == 22
    rows = dataset.__getitems__([21, 3, 3, 0])
    assert isinstance(rows, CachedRows) and set(rows.codes) == {"base", "special"}
    assert torch.equal(store.codec.decode({name: rows.rows[name] for name in rows.codes}), store.read([21, 3, 3, 0]))
    assert rows.rows["labels"].tolist() == [1, 3, 3, 0]


def test_replay_turns_to_another_store(store, tmp_path):
    other = build(zoo.make("vit"), tmp_path, cut=3, codec="int8")
    dataset = ReplayDataset(NoItems(), SourceSwitch(), seed=0)
    for current in (store, other, store):
        dataset.switch.set(current.path)
        rows = dataset.__getitems__([5, 1])
        assert torch.equal(current.codec.decode(rows.rows), current.read([5, 1]))


def test_loader_batches_of_a_shuffled_sampler_are_the_same_rows_live_and_replayed(store):
    dataset = ReplayDataset(Rows(), SourceSwitch(), seed=0)

    def labels():
        loader = DataLoader(
            dataset,
            batch_size=5,
            shuffle=True,
            generator=torch.Generator().manual_seed(4),
            collate_fn=ReplayCollator(collate),
        )
        return [batch["labels"].tolist() for batch in loader]

    live = labels()
    dataset.switch.set(store.path)
    assert labels() == live


def test_data_set_pickles_without_its_mapped_files(store):
    dataset = ReplayDataset([1, 2, 3], SourceSwitch(), seed=0)
    dataset.switch.set(store.path)
    dataset.__getitems__([0])
    assert len(pickle.dumps(dataset.__getstate__()["_store"])) < 100


# Which view


def test_choice_depends_on_seed_epoch_and_sample_alone():
    samples = list(range(1000))
    chosen = choose_views(3, 5, samples, 2)
    assert np.array_equal(choose_views(3, 5, samples[::-1], 2)[::-1], chosen)
    assert [int(choose_views(3, 5, [sample], 2)[0]) for sample in samples[:20]] == chosen[:20].tolist()
    assert not np.array_equal(choose_views(3, 6, samples, 2), chosen)
    assert not np.array_equal(choose_views(4, 5, samples, 2), chosen)


def test_every_view_is_chosen_alike():
    counts = np.bincount(choose_views(0, 0, range(9000), 2), minlength=3)
    assert abs(counts - 3000).max() < 200
    assert choose_views(0, 0, range(10), 0).tolist() == [0] * 10


def test_batch_holds_the_chosen_views(tmp_path):
    _, store = train(picture_dataset().with_transform(replayable()), tmp_path, views=2)
    switch = SourceSwitch()
    switch.set(store.path)
    switch.epoch = 4
    dataset = ReplayDataset(list(range(32)), switch, seed=3)
    batch = ReplayCollator(None)(dataset.__getitems__([5, 1, 30]))
    chosen = choose_views(3, 4, [5, 1, 30], 2)
    assert batch["freezecache.view_index"].tolist() == chosen.tolist()
    singly = ReplayCollator(None)([dataset[5], dataset[1], dataset[30]])
    assert batch.keys() == singly.keys()
    for name, value in batch.items():
        assert torch.equal(value, singly[name])
        for place, view in enumerate(chosen):
            if view and name == "freezecache.view":
                assert value[place].tolist() == store.dataset[[5, 1, 30][place]][f"view_{view}"]


def test_live_draws_depend_on_seed_epoch_and_sample_alone():
    switch = SourceSwitch()
    rows = picture_dataset().with_transform(replayable())

    def pixels(indices, epoch, seed=3):
        switch.epoch = epoch
        return {
            index: row["pixel_values"]
            for index, row in zip(indices, ReplayDataset(rows, switch, seed).__getitems__(indices), strict=True)
        }

    together = pixels(list(range(16)), epoch=1)
    torch.manual_seed(123)
    backwards = pixels(list(range(15, -1, -1)), epoch=1)
    assert all(torch.equal(together[index], backwards[index]) for index in together)
    for other in (pixels(list(range(16)), epoch=2), pixels(list(range(16)), epoch=1, seed=4)):
        assert not all(torch.equal(together[index], other[index]) for index in together)


# Views of a round of writing


@pytest.mark.parametrize("views", [0, 1, 3])
def test_rounds_draw_each_view_of_a_sample_once(views):
    drawn = np.stack([rotate_views(3, WriteRound(number, views), range(200)) for number in range(views + 1)])
    assert (np.sort(drawn, axis=0) == np.arange(views + 1)[:, None]).all()
    if views:
        assert all(np.bincount(of_round, minlength=views + 1).min() > 20 for of_round in drawn)


def test_switch_keeps_a_round_until_it_is_set():
    switch = SourceSwitch()
    for round in (WriteRound(1, 2, (PROJECTIVE, (3, 5))), WriteRound(0, 0)):
        switch.write(round)
        assert switch.round == round and switch.path is None
    switch.set(None)
    assert switch.round is None


# Packed rows


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_processes_read_packed_rows(workers, tmp_path):
    _, store = build_plain_and_packed(tiny_vit(), tmp_path)
    switch = SourceSwitch()
    switch.set(store.path)
    loader = DataLoader(
        ReplayDataset(Rows(), switch, seed=3), batch_size=8, collate_fn=ReplayCollator(collate), num_workers=workers
    )
    for _ in range(2):
        rows = torch.cat([take_codes(batch)[0]["base"] for batch in loader])
        assert torch.equal(rows, store.read_rows(range(22))["base"])
