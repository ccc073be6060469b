"""Data sets that remember something from row to row: looking at them leaves them where they were."""

import itertools
import queue
import random
from collections import Counter, deque

import numpy as np
import pytest
import torch
from support.builds import Rows, collate
from support.helpers import losses, make_args, manual, pixel_dataset, tiny_vit
from transformers import Trainer

from hf_freezecache import FreezeCacheTrainer
from hf_freezecache.training.data_state import undisturbed

GLOBAL = np.random.default_rng(5)


class Stateful(Rows):
    """Images with a value added that depends on the draws before."""

    def __init__(self):
        super().__init__(32)

    def __getitem__(self, row):
        sample = super().__getitem__(row)
        return {**sample, "pixel_values": sample["pixel_values"] + self.next_value()}


class Counts(Stateful):
    def __init__(self):
        super().__init__()
        self.count = 0

    def next_value(self):
        self.count += 1
        return 0.01 * self.count


class CountsInTheClass(Stateful):
    count = 0

    def next_value(self):
        type(self).count += 1
        return 0.01 * self.count


class Visits(Stateful):
    def __init__(self):
        super().__init__()
        self.visits, self.seen, self.last = np.zeros(4), Counter(), torch.zeros(2)

    def next_value(self):
        self.visits[1] += 0.01
        self.seen["all"] += 1
        self.last += 0.01
        return float(self.visits[1] + self.last[0]) + 0.01 * self.seen["all"]


class Draws(Stateful):
    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def next_value(self):
        return float(self.draw())


class Takes(Stateful):
    """From a queue, and puts at its end."""

    def __init__(self):
        super().__init__()
        self.queue, self.waiting = deque([0.1, 0.2, 0.5]), queue.Queue()
        for value in (0.3, 0.7):
            self.waiting.put(value)

    def next_value(self):
        self.queue.rotate(1)
        value = self.waiting.get()
        self.waiting.put(value)
        return self.queue[0] + value


class DrawsFromGlobals(Stateful):
    def next_value(self):
        return GLOBAL.normal()


def own_generator():
    return Draws(np.random.default_rng(3).normal)


def closure():
    generator, count = random.Random(4), 0

    def draw():
        nonlocal count
        count += 1
        return generator.random() + 0.01 * count

    return Draws(draw)


def of_torch():
    generator = torch.Generator().manual_seed(3)
    return Draws(lambda: torch.randn((), generator=generator))


KINDS = [Counts, CountsInTheClass, Visits, Takes, DrawsFromGlobals, own_generator, closure, of_torch]


class Noisy:
    """A collator with a generator of its own."""

    def __init__(self):
        self.generator = np.random.RandomState(3)

    def __call__(self, samples):
        batch = collate(samples)
        return {**batch, "pixel_values": batch["pixel_values"] + self.generator.normal(size=(len(samples), 1, 1, 1))}


def train(trainer_class, dataset, path, collator=collate, **own):
    trainer = trainer_class(
        model=tiny_vit(),
        args=make_args(path, num_train_epochs=3, max_steps=10),
        train_dataset=dataset,
        data_collator=collator,
        **own,
    )
    trainer.train()
    return losses(trainer)


def fresh(kind):
    CountsInTheClass.count = 0
    GLOBAL.bit_generator.state = np.random.default_rng(5).bit_generator.state
    return kind()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_before_the_freeze_are_those_of_a_plain_trainer(kind, tmp_path):
    expected = train(Trainer, fresh(kind), tmp_path)
    assert len(set(expected)) == 10
    own = dict(freeze_cache=manual("2:2", cache="auto"))
    assert train(FreezeCacheTrainer, fresh(kind), tmp_path, **own)[:8] == expected[:8]


def test_collators_and_transforms_go_on_from_where_they_were(tmp_path):
    def transformed():
        generator = np.random.default_rng(3)
        return pixel_dataset().with_transform(
            lambda rows: {**rows, "pixel_values": [torch.tensor(x) + generator.normal() for x in rows["pixel_values"]]}
        )

    for make, collator in ((transformed, lambda: collate), (lambda: Rows(32), Noisy)):
        expected = train(Trainer, make(), tmp_path, collator())
        own = dict(freeze_cache=manual("2:2", cache="auto"))
        assert train(FreezeCacheTrainer, make(), tmp_path, collator(), **own)[:8] == expected[:8]


class Reads(Stateful):
    """Reads a file on, beside a counter that says where it is."""

    def __init__(self, path):
        super().__init__()
        self.count, self.file = 0, open(path)

    def next_value(self):
        self.count += 1
        return float(self.file.readline())


def test_half_of_a_state_is_not_put_back(tmp_path):
    path = tmp_path / "values"
    path.write_text("\n".join(map(str, range(100))))
    for dataset in (Reads(path), Draws(itertools.count().__next__), Draws(iter(range(100)).__next__)):
        dataset.other = [0]
        with undisturbed(dataset):
            dataset[0]
            dataset.other.append(1)
        assert dataset.other == [0, 1]
    with undisturbed(reading := Reads(path)):
        reading[0]
    assert reading.count == 1


def test_what_was_made_at_its_first_use_stays_and_large_data_is_not_copied():
    class Lazy(Stateful):
        def __init__(self):
            super().__init__()
            self.table, self.known, self.large, self.rows = None, {}, torch.zeros(1 << 20), list(range(20_000))

        def next_value(self):
            if self.table is None:
                self.table = np.ones(1)
            self.more = getattr(self, "more", np.ones(1))
            self.known[len(self.known)] = np.ones(1)
            return 1.0

    dataset = Lazy()
    with undisturbed(dataset):
        dataset[0]
        table = dataset.table
    assert dataset.table is table and dataset.more is not None and dataset.known == {}
    with undisturbed(dataset):
        dataset.number = dataset.count = 1
        dataset.large[0] = 1  # is state after all: then nothing is put back
    assert dataset.count == 1
    with undisturbed(dataset):
        dataset.count = 2
        dataset.other = 3
    assert dataset.count == 1 and not hasattr(dataset, "other")
