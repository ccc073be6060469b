"""Stores built from a tiny model and tiny data, by one process or by several simulated ones."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from hf_freezecache import BlockChain
from hf_freezecache.build.feature_sources import ImageFeatures
from hf_freezecache.build.materialize import materialize
from hf_freezecache.build.store_spec import StoreSpec
from hf_freezecache.cache.fingerprint import fingerprint_inputs
from hf_freezecache.cache.manifest import FORMAT_VERSION
from hf_freezecache.cache.rows import RowSource
from hf_freezecache.cache.store import FeatureStore
from hf_freezecache.distributed import Group


class Rows(torch.utils.data.Dataset):
    """A plain map-style data set: images whose values follow from their number, with a label of any kind."""

    def __init__(self, rows: int = 22, size: int = 16, label=lambda row: row % 5):
        self.rows, self.size, self.label = rows, size, label

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict:
        generator = torch.Generator().manual_seed(row)
        return {"pixel_values": torch.randn(3, self.size, self.size, generator=generator), "labels": self.label(row)}


class SlowRows(Rows):
    """Rows that take time to load: every one moves the clock of the fixture `clock` on."""

    def __init__(self, clock, seconds=0.05, rows=22):
        super().__init__(rows)
        self.clock, self.seconds = clock, seconds

    def __getitem__(self, row):
        self.clock(self.seconds)
        return super().__getitem__(row)


class NoItems(Rows):
    """A data set that must not be read."""

    def __getitem__(self, row):
        raise AssertionError("a live sample was read in a replay epoch")


def collate(samples: list[dict]) -> dict:
    """Stacks what stacks; other entries stay lists."""
    batch = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        if isinstance(values[0], torch.Tensor):
            batch[name] = torch.stack(values)
        else:
            batch[name] = values if isinstance(values[0], str) else torch.tensor(values)
    return batch


def without_labels(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if name != "labels"}


def make_text_spec(model, directory: Path, texts, collator, cut: int = 2, codec: str = "int4") -> StoreSpec:
    """A spec of texts that are stored without padding, in ranges of four."""
    chain = BlockChain.from_model(model.eval(), probe=without_labels(collator([texts[row] for row in range(6)])))
    layout = chain.stored_layout(cut)
    assert layout.is_token
    source = RowSource(texts, collator, 4, seed=0)
    features = ImageFeatures(chain, cut, source, layout, without_labels)
    return StoreSpec(chain, cut, source, codec, layout, {}, directory, features, tokens=16.0)


def make_spec(model, directory: Path, dataset=None, cut: int = 2, codec: str = "int4", **settings) -> StoreSpec:
    """A spec as the trainer makes it; `settings` go to the `RowSource`."""
    settings = {"collator": collate, "batch_size": 4, "seed": 3, **settings}
    source = RowSource(Rows() if dataset is None else dataset, **settings)
    # Labels of any kind: what the model makes of them is not the store's business.
    chain = BlockChain.from_model(model, probe={"pixel_values": source.probe()["pixel_values"]})
    made_from = fingerprint_inputs(
        source=source,
        model=model,
        tensors=chain.prefix_state(cut),
        cut=cut,
        blocks=chain.names[:cut],
        codec=codec,
        augmentation={"views": 0},
        precision="no",
        format_version=FORMAT_VERSION,
    )
    return StoreSpec(
        chain=chain,
        cut=cut,
        source=source,
        codec=codec,
        layout=chain.layout(cut),
        made_from=made_from,
        directory=directory,
        feature_source=ImageFeatures(chain, cut, source, chain.layout(cut), lambda batch: batch),
        disable_tqdm=True,
    )


def build(model, directory: Path, dataset=None, **settings) -> FeatureStore:
    return materialize(make_spec(model, directory, dataset, **settings), Group())


class Meeting:
    """Where simulated processes exchange values: one runs at a time, all wait for each other at every exchange."""

    def __init__(self, size: int):
        self.values, self.barrier, self.turn = [None] * size, threading.Barrier(size), threading.Lock()

    def exchange(self, rank: int, value):
        self.values[rank] = value
        self.turn.release()
        self.barrier.wait(timeout=60)
        values = list(self.values)
        self.barrier.wait(timeout=60)
        self.turn.acquire()
        return values


class SimulatedGroup(Group):
    """A process of a group whose members are threads that never run at once (model and generators are shared)."""

    def __init__(self, rank: int, size: int, meeting: Meeting):
        super().__init__(rank, size)
        object.__setattr__(self, "meeting", meeting)

    def _broadcast(self, value):
        return self.meeting.exchange(self.rank, value)[0]

    def _gather(self, value):
        return self.meeting.exchange(self.rank, value)


def on_every_process(size: int, work) -> list:
    """Runs `work(group)` on every simulated process; returns results or raised errors, by rank."""
    meeting, results = Meeting(size), [None] * size

    def target(rank):
        with meeting.turn:
            try:
                results[rank] = work(SimulatedGroup(rank, size, meeting))
            except Exception as error:
                results[rank] = error

    threads = [threading.Thread(target=target, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return results


def flip(file: Path, position: int) -> None:
    """Damages one bit of a file."""
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
