"""The rows that a training asks for: stamped by the innermost sampler of its loader, whoever has wrapped it."""

import pickle

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, SkipBatchSampler, prepare_data_loader
from support.asking import wrap
from support.builds import Rows
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, WeightedRandomSampler

from hf_freezecache.replay.requests import (
    RequestedRow,
    RowOrigin,
    SourceSwitch,
    StampingSampler,
    find_switch,
    stamp_rows,
)


def rows_of(loader):
    """What the batch sampler yields."""
    return [row for batch in loader.batch_sampler for row in batch]


def stamped(loader, rows=22):
    switch = SourceSwitch(rows)
    stamp_rows(loader, switch)
    return switch


def shuffled(seed=4):
    return RandomSampler(range(22), generator=torch.Generator().manual_seed(seed))


def test_row_is_its_number_and_travels_to_another_process(tmp_path):
    row = RequestedRow(5, RowOrigin(3, tmp_path), 2)
    assert row == 5 and [4, 5, 6][RequestedRow(1, RowOrigin())] == 5
    again = pickle.loads(pickle.dumps([row, RequestedRow(6, row.origin)]))
    assert again == [5, 6] and again[0].origin == row.origin and again[0].occurrence == 2
    assert again[0].origin is again[1].origin


def test_iterations_of_the_training_are_stamped_and_others_are_not():
    loader = DataLoader(Rows(), batch_size=4, sampler=shuffled())
    plain = rows_of(DataLoader(Rows(), batch_size=4, sampler=shuffled()))
    switch = stamped(loader)
    with switch.requesting():
        asked = rows_of(loader)
    assert asked == plain and all(type(row) is RequestedRow for row in asked)
    assert all(type(row) is int for row in rows_of(loader))


def test_only_the_first_iteration_is_an_evaluations():
    loader = DataLoader(Rows(), batch_size=4)
    switch = stamped(loader)
    with switch.requesting(once=True):
        assert all(type(row) is RequestedRow for row in rows_of(loader))
        assert all(type(row) is int for row in rows_of(loader))
    assert not switch.begins()


def test_occurrences_count_within_an_epoch_over_all_passes():
    weighted = WeightedRandomSampler([10.0, 1.0, 1.0], 30, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(range(3), batch_size=4, sampler=weighted)
    switch = stamped(loader, 3)
    for _ in range(2):
        switch.epoch += 1
        with switch.requesting():
            rows = rows_of(loader) + rows_of(loader)
        for number in range(3):
            assert [row.occurrence for row in rows if row == number] == list(range(rows.count(number)))


def test_source_is_that_of_the_moment_in_which_a_row_is_drawn(tmp_path):
    loader = DataLoader(Rows(), batch_size=4)
    switch = stamped(loader)
    with switch.requesting():
        batches = iter(loader.batch_sampler)
        first = next(batches)
    switch.set(tmp_path)
    second = next(batches)
    assert first[0].origin.store is None and second[0].origin.store == tmp_path


@pytest.mark.parametrize("seedable", [False, True])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("even", [True, False])
def test_shards_of_two_processes_are_the_same_rows(seedable, split, even):
    def prepare(process):
        loader = DataLoader(Rows(), batch_size=4, sampler=shuffled())
        return prepare_data_loader(
            loader,
            num_processes=2,
            process_index=process,
            split_batches=split,
            even_batches=even,
            use_seedable_sampler=seedable,
            data_seed=7,
        )

    for process in range(2):
        plain, loader = prepare(process), prepare(process)
        switch = stamped(loader)
        assert find_switch(loader) is switch and find_switch(plain) is None
        for epoch in (0, 3):
            for one in (plain, loader):
                one.set_epoch(epoch)
            with switch.requesting():
                assert rows_of(loader) == rows_of(plain)
        assert len(loader) == len(plain)


def test_skipped_batches_count():
    loader = DataLoaderShard(Rows(), batch_sampler=BatchSampler([0, 1, 0, 1, 0, 1], 2, False))
    switch = stamped(loader)
    skipping = SkipBatchSampler(loader.batch_sampler, skip_batches=2)
    with switch.requesting():
        assert [row.occurrence for batch in skipping for row in batch] == [2, 2]
    assert find_switch(DataLoader(Rows(), batch_sampler=skipping)) is switch


class Pairs(BatchSampler):
    """Makes its batches itself."""

    def __init__(self):
        super().__init__(SequentialSampler(range(22)), 2, False)

    def __iter__(self):
        yield from ([row, 21 - row] for row in range(11))


def test_batch_sampler_of_the_users_is_stamped_itself():
    for loader in (
        DataLoader(Rows(), batch_sampler=Pairs()),
        DataLoaderShard(Rows(), batch_sampler=Pairs()),
        DataLoaderShard(Rows(), batch_sampler=BatchSamplerShard(Pairs(), 1, 0)),
    ):
        switch = stamped(loader)
        with switch.requesting():
            batches = list(loader)
        assert find_switch(loader) is switch and len(batches) == len(loader) == 11
        with switch.requesting():
            rows = rows_of(loader)
        assert rows[:4] == [0, 21, 1, 20] and {row.occurrence for row in rows} == {1}


def test_sampler_in_anothers_place_is_that_one_to_whoever_asks():
    sampler = StampingSampler(shuffled(), SourceSwitch(22))
    assert isinstance(sampler, RandomSampler) and len(sampler) == 22
    assert sampler.generator.initial_seed() == 4 and not hasattr(sampler, "set_epoch")
    sampler.generator = None
    assert sampler._sampler.generator is None
    again = pickle.loads(pickle.dumps(sampler))
    assert type(again) is StampingSampler and len(again) == 22

    class WithoutLength:
        def __iter__(self):
            return iter(range(3))

    with pytest.raises(TypeError, match="has no len"):
        len(StampingSampler(WithoutLength(), SourceSwitch(3)))


def test_loader_without_batches_is_left_alone():
    loader = DataLoader(Rows(), batch_size=None)
    stamp_rows(loader, SourceSwitch(22))
    stamp_rows(object(), SourceSwitch(22))
    assert find_switch(loader) is None and len(list(loader)) == 22


def test_loader_that_a_user_makes_of_the_data_set_reads_images(store):
    dataset = wrap(Rows())
    dataset.switch.set(store.path)
    with dataset.switch.requesting():
        samples = list(DataLoader(dataset, batch_size=None))
    assert all(torch.equal(sample["pixel_values"], Rows()[row]["pixel_values"]) for row, sample in enumerate(samples))
