"""The wrapped data set: rows from images or from a store, and the views that it takes."""

import gc
import pickle

import numpy as np
import pytest
import torch
from support import zoo
from support.asking import TrainingLoader, ask, ask_singly, wrap
from support.builds import NoItems, Rows, build, collate
from support.helpers import pixel_dataset, tiny_vit
from support.images import picture_dataset, replayable
from support.packed_stores import build_plain_and_packed
from support.view_trainings import train

from hf_freezecache.augment.geometry import PROJECTIVE
from hf_freezecache.cache.rows import RowSource
from hf_freezecache.replay.collator import ReplayCollator, take_codes
from hf_freezecache.replay.dataset import CachedRows, choose_views, live_batch, rotate_views
from hf_freezecache.replay.requests import RequestedRow, RowOrigin, SourceSwitch, WriteRound

# Rows that the training asks for


def test_source_reaches_persistent_workers_with_the_rows(store):
    dataset = wrap(Rows())
    loader = TrainingLoader(
        dataset, batch_size=4, num_workers=2, persistent_workers=True, collate_fn=ReplayCollator(collate)
    )
    live = list(loader)
    assert not any(take_codes(batch) for batch in live)
    dataset.switch.set(store.path)
    replayed = list(loader)
    others = list(loader.loader)  # somebody else's iteration in the same epoch
    dataset.switch.set(None)
    again = list(loader)
    for images in (others, again):
        assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(live, images, strict=True))
    assert len(replayed) == len(live) == 6
    for number, batch in enumerate(replayed):
        taken = take_codes(batch)
        rows = range(4 * number, min(4 * number + 4, 22))
        assert torch.equal(store.codec.decode(taken.codes), store.read(rows))
        assert torch.equal(taken.inputs["labels"], live[number]["labels"])
        assert taken.rows.numbers.tolist() == list(rows) and taken.rows.occurrences.tolist() == [1] * len(rows)
    del loader
    gc.collect()


# The data set


def test_wrapped_data_set_has_the_length_and_samples_of_the_inner_one():
    inner = pixel_dataset(10)
    dataset = wrap(inner)
    assert len(dataset) == 10
    assert torch.equal(dataset[3]["pixel_values"], inner[3]["pixel_values"])
    for many in (dataset.__getitems__([7, 0, 7]), ask(dataset, [7, 0, 7]), ask_singly(dataset, [7, 0, 7])):
        assert [sample["labels"].item() for sample in many] == [inner[row]["labels"].item() for row in (7, 0, 7)]


def test_users_data_set_gets_the_numbers_that_the_sampler_yields():
    class Seen(Rows):
        def __getitem__(self, row):
            seen.append((type(row), row))
            return super().__getitem__(int(row))

    seen = []
    dataset = wrap(Seen())
    ask(dataset, [3, np.int64(4), torch.tensor(5)])
    assert seen == [(int, 3), (np.int64, 4), (torch.Tensor, 5)]


class PinningTorch:
    """torch as a module sees it, with memory that pretends to be page-locked."""

    def __init__(self):
        self.pinned = []

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *size, pin_memory=False, **settings):
        made = torch.empty(*size, **settings)
        if pin_memory:
            self.pinned.append(made)
        return made


def test_codes_are_read_into_page_locked_memory_where_the_loader_asks_for_it(store, monkeypatch):
    """Only in the training's process; and the pinned tensors themselves are handed on: torch knows copies by them."""
    pinning = PinningTorch()
    monkeypatch.setattr("hf_freezecache.cache.store.torch", pinning)
    dataset = wrap(Rows())
    dataset.switch.set(store.path)
    ask(dataset, [3, 0])
    assert not pinning.pinned
    dataset.pinned = True
    rows = ask(dataset, [3, 0])
    places = list(pinning.pinned)
    assert [rows.rows[name] is place for name, place in zip(rows.codes, places, strict=True)] == [True] * len(places)
    assert torch.equal(store.codec.decode({name: rows.rows[name] for name in rows.codes}), store.read([3, 0]))
    in_workers = next(iter(TrainingLoader(dataset, batch_size=2, num_workers=1, collate_fn=ReplayCollator(collate))))
    assert take_codes(in_workers) is not None and len(pinning.pinned) == len(places)


def test_numbers_that_are_no_rows_are_the_users_own(store):
    dataset = wrap({"a": 1, "b": 2})
    dataset.switch.set(store.path)
    assert ask(dataset, ["b", "a"]) == [2, 1]
    assert type(dataset.switch.stamp(-1)) is int and type(dataset.switch.stamp(2)) is int


def test_rows_of_two_sources_in_a_batch_are_drawn_live(store):
    dataset = wrap(Rows())
    live = dataset.switch.stamp(3)
    dataset.switch.set(store.path)
    samples = dataset.__getitems__([live, dataset.switch.stamp(4)])
    assert torch.equal(samples[1]["pixel_values"], Rows()[4]["pixel_values"])


def test_replay_reads_rows_in_the_order_asked_for_and_no_live_sample(store):
    dataset = wrap(NoItems())
    dataset.switch.set(store.path)
    assert len(dataset) == 22
    rows = ask(dataset, [21, 3, 3, 0])
    assert isinstance(rows, CachedRows) and set(rows.codes) == {"base", "special"}
    assert torch.equal(store.codec.decode({name: rows.rows[name] for name in rows.codes}), store.read([21, 3, 3, 0]))
    assert rows.rows["labels"].tolist() == [1, 3, 3, 0]
    assert rows.requested.occurrences.tolist() == [0, 0, 1, 0]


def test_replay_turns_to_another_store(store, tmp_path):
    other = build(zoo.make("vit"), tmp_path, cut=3, codec="int8")
    dataset = wrap(NoItems())
    for current in (store, other, store):
        dataset.switch.set(current.path)
        rows = ask(dataset, [5, 1])
        assert torch.equal(current.codec.decode(rows.rows), current.read([5, 1]))


def test_loader_batches_of_a_shuffled_sampler_are_the_same_rows_live_and_replayed(store):
    dataset = wrap(Rows())

    def labels():
        loader = TrainingLoader(
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
    dataset = wrap(list(range(22)))
    dataset.switch.set(store.path)
    ask(dataset, [0])
    assert len(pickle.dumps(dataset)) < 300


def test_copy_of_a_range_in_memory_reads_its_rows(store):
    """A spawned process gets a range in memory without the rows beside it."""
    dataset = wrap(pixel_dataset(22).select(range(5, 17)))
    origin = RowOrigin(store=store.path, handle=store.select(range(5, 17)).handle)
    copied = pickle.loads(pickle.dumps(dataset))
    for data in (dataset, copied):
        found = data.__getitems__([RequestedRow(row, origin, 0) for row in (0, 11)])
        assert torch.equal(found.rows["labels"], store.read_rows([5, 16])["labels"])


# Live samples


def test_live_samples_are_those_of_the_live_epoch():
    dataset = wrap(picture_dataset().with_transform(replayable()), seed=3)
    dataset.switch.epoch = 4
    rows = [5, 1, 5, 5]
    drawn = ask(dataset, rows)
    again = dataset.live_samples([5, 5, 1], [2, 0, 0], epoch=4)
    for sample, position in zip(again, (3, 0, 1), strict=True):
        assert torch.equal(sample["pixel_values"], drawn[position]["pixel_values"])
    assert len({sample["pixel_values"].numpy().tobytes() for sample in drawn}) == 4


def test_batch_of_a_store_is_drawn_again_live(store):
    dataset, source = wrap(Rows()), RowSource(Rows(), collate, batch_size=4, seed=0)
    dataset.switch.set(store.path)
    replayed = take_codes(ReplayCollator(collate)(ask(dataset, [7, 2])))
    batch = live_batch(source, replayed.rows)
    assert torch.equal(batch["pixel_values"], collate([Rows()[7], Rows()[2]])["pixel_values"])


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


def test_views_come_in_turn_over_epochs_and_within_them():
    over_epochs = np.stack([choose_views(0, epoch, range(50), 2) for epoch in range(6)])
    assert (np.sort(over_epochs[:3], axis=0) == np.arange(3)[:, None]).all()
    assert (over_epochs[:3] == over_epochs[3:]).all()
    within = choose_views(0, 1, [7] * 6, 2, range(6))
    assert sorted(within[:3]) == [0, 1, 2] and within[0] == over_epochs[1, 7] and within[1] == over_epochs[2, 7]


def test_no_view_beside_the_base_view_is_no_choice():
    assert choose_views(0, 0, range(10), 0).tolist() == [0] * 10


def test_batch_holds_the_chosen_views(tmp_path):
    _, store = train(picture_dataset().with_transform(replayable()), tmp_path, views=2)
    dataset = wrap(NoItems(32), seed=3)
    dataset.switch.set(store.path)
    dataset.switch.epoch = 4
    batch = ReplayCollator(None)(ask(dataset, [5, 1, 30]))
    chosen = choose_views(3, 4, [5, 1, 30], 2)
    assert batch["freezecache.view_index"].tolist() == chosen.tolist()
    dataset.switch.epoch = 4
    singly = ReplayCollator(None)(ask_singly(dataset, [5, 1, 30]))
    assert batch.keys() == singly.keys()
    for name, value in batch.items():
        assert torch.equal(value, singly[name])
        for place, view in enumerate(chosen):
            if view and name == "freezecache.view":
                assert value[place].tolist() == store.dataset[[5, 1, 30][place]][f"view_{view}"]


def test_live_draws_depend_on_seed_epoch_and_sample_alone():
    rows = picture_dataset().with_transform(replayable())

    def pixels(indices, epoch, seed=3):
        dataset = wrap(rows, seed)
        dataset.switch.epoch = epoch
        samples = ask(dataset, indices)
        return {index: sample["pixel_values"] for index, sample in zip(indices, samples, strict=True)}

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


def test_views_of_a_round_come_in_turn_too():
    drawn = rotate_views(3, WriteRound(1, 2), [7, 7, 7], [0, 1, 2])
    assert sorted(drawn) == [0, 1, 2] and drawn[0] == rotate_views(3, WriteRound(1, 2), [7])[0]


def test_switch_keeps_a_round_until_it_is_set():
    switch = SourceSwitch(1)
    for round in (WriteRound(1, 2, (PROJECTIVE, (3, 5))), WriteRound(0, 0)):
        switch.write(round)
        assert switch.round == round and switch.path is None
    switch.set(None)
    assert switch.round is None


# Packed rows


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_processes_read_packed_rows(workers, tmp_path):
    _, store = build_plain_and_packed(tiny_vit(), tmp_path)
    dataset = wrap(Rows(), seed=3)
    dataset.switch.set(store.path)
    loader = TrainingLoader(dataset, batch_size=8, collate_fn=ReplayCollator(collate), num_workers=workers)
    for _ in range(2):
        rows = torch.cat([take_codes(batch).codes["base"] for batch in loader])
        assert torch.equal(rows, store.read_rows(range(22))["base"])
