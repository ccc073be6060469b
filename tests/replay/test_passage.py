"""Batches of features through what users put around the training's loader."""

import threading

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from support.asking import wrap
from support.builds import NoItems, Rows, collate
from torch.utils.data import DataLoader, RandomSampler

from hf_freezecache.cache.rows import split_batch
from hf_freezecache.replay.collator import ReplayCollator
from hf_freezecache.replay.passage import trial_rows, why_not_through
from hf_freezecache.replay.requests import find_switch, stamp_rows

SIZE = 4


@pytest.fixture(params=[False, True], ids=["torch", "accelerate"])
def loader(request):
    sampler = RandomSampler(range(22), generator=torch.Generator().manual_seed(3))
    loader = DataLoader(wrap(NoItems()), SIZE, sampler=sampler, collate_fn=ReplayCollator(collate), num_workers=2)
    if request.param:
        loader = Accelerator(cpu=True).prepare(loader)
    stamp_rows(loader, loader.dataset.switch)
    return loader


def reason(outer, loader, *shared):
    probe = {**collate([Rows()[0], Rows()[1]]), "name": ["a", "b"], "scale": 2.0}
    rows = trial_rows(split_batch(probe, "pixel_values"), SIZE)
    return why_not_through(outer, loader, loader.dataset.switch, rows, shared)


class Wrapper:
    def __init__(self, loader, change=lambda batch: batch):
        self.loader, self.change = loader, change

    def __iter__(self):
        for batch in self.loader:
            yield self.change(batch)


class Endless(Wrapper):
    def __iter__(self):
        while True:
            yield from self.loader


class Keeping(Wrapper):
    """Reads once and yields the same ever after."""

    kept = None

    def __iter__(self):
        if self.kept is None:
            self.kept = list(self.loader)
        return iter(self.kept)


class Locked(Wrapper):
    def __init__(self, loader):
        super().__init__(loader)
        self.lock = threading.Lock()


def test_the_loader_itself_is_not_tried(loader):
    assert reason(loader, loader) is None


@pytest.mark.parametrize("make", [Wrapper, Endless, Keeping])
def test_wrapper_that_hands_batches_on_is_fine_and_does_not_notice(make, loader):
    outer = make(loader)
    assert reason(outer, loader) is None
    assert getattr(outer, "kept", None) is None


def test_loader_around_the_same_batch_sampler_is_fine(loader):
    outer = DataLoader(loader.dataset, batch_sampler=loader.batch_sampler, collate_fn=loader.collate_fn)
    assert reason(outer, loader) is None


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (
            lambda loader: Wrapper(loader, lambda batch: {**batch, "pixel_values": batch["pixel_values"] + 1}),
            "KeyError",
        ),
        (lambda loader: Wrapper(loader, lambda batch: {**batch, "labels": batch["labels"] + 1}), "as it went in"),
        (lambda loader: Wrapper(loader, lambda batch: {"labels": batch["labels"]}), "as it went in"),
        (lambda loader: Wrapper(loader, lambda batch: list(batch.values())), "as it went in"),
        (lambda loader: [], "as it went in"),
        (lambda loader: (batch for batch in loader), "only once"),
        (Locked, "cannot be tried out"),
        (lambda loader: DataLoader(loader.dataset, batch_size=4), "do not come through the trainer's sampler"),
        (lambda loader: DataLoader(Rows(), batch_size=4), "do not come through the trainer's sampler"),
        (
            lambda loader: DataLoader(loader.dataset, batch_sampler=loader.batch_sampler, collate_fn=collate),
            "fails on a batch of features",
        ),
        (lambda loader: Wrapper(DataLoader(Rows(), batch_size=4, collate_fn=collate)), "as it went in"),
    ],
)
def test_reason_is_named(make, why, loader):
    assert why in reason(make(loader), loader)


def test_wrapper_that_holds_the_trainer_shares_it(loader):
    class Trainer:
        def __deepcopy__(self, memo):
            raise AssertionError("the trainer was copied")

    outer = Wrapper(loader)
    outer.trainer = Trainer()
    assert reason(outer, loader, outer.trainer) is None
    assert "the trainer was copied" in reason(outer, loader)


def test_nothing_else_notices(loader):
    switch = find_switch(loader)
    generator = loader.batch_sampler.sampler.generator
    before = torch.get_rng_state(), generator.get_state(), getattr(loader, "iteration", None)
    references = list(GradientState().dataloader_references)
    reason(Endless(loader), loader)
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.equal(generator.get_state(), before[1])
    assert getattr(loader, "iteration", None) == before[2] and loader.num_workers == 2
    assert switch.trial is None and not switch.begins() and list(GradientState().dataloader_references) == references
    with switch.requesting():
        rows = [row for batch in loader.batch_sampler for row in batch]
    assert {row.occurrence for row in rows} == {0} and len(rows) == 22
