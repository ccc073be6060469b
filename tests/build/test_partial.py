"""The directory that live epochs write: what it keeps, and how it becomes a store."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.builds import Rows, build, collate, make_spec, on_every_process
from support.helpers import messages, tiny_vit
from support.packed_stores import pack

from hf_freezecache.build.feature_sources import ViewRun
from hf_freezecache.build.materialize import materialize
from hf_freezecache.build.partial import PartialStore
from hf_freezecache.cache.names import partial_path
from hf_freezecache.cache.view_columns import ViewSpec
from hf_freezecache.distributed import Group


def write_rows(partial: PartialStore, rows, views=None) -> None:
    source, chain = partial.spec.source, partial.spec.chain
    batch = source.collate(rows)
    inputs = {name: value for name, value in batch.items() if name != "pixel_values"}
    features = chain.prefix({"pixel_values": batch["pixel_values"]}, partial.spec.cut)
    views = np.zeros(len(rows), np.int64) if views is None else views
    partial.write(rows, views, ViewRun(inputs, {}, features))


def label(row):
    return {"number": row, "text": f"ä {row}", "real": row / 3}


class Labelled(Rows):
    """Inputs of every kind."""

    def __init__(self, rows=22):
        super().__init__(rows)

    def __getitem__(self, row):
        return {"pixel_values": super().__getitem__(row)["pixel_values"], "box": torch.arange(3) + row, **label(row)}


def collate_labelled(samples):
    lists = {name: [sample[name] for sample in samples] for name in ("text", "real")}
    rest = [{name: sample[name] for name in ("pixel_values", "box", "number")} for sample in samples]
    return {**collate(rest), **lists}


@pytest.mark.parametrize("codec", ["fp32", "int4"])
@pytest.mark.parametrize("processes", [1, 2])
def test_rows_in_any_order_become_the_store_of_a_build(codec, processes, tmp_path):
    settings = dict(dataset=Labelled(), codec=codec, collator=collate_labelled)
    built = build(tiny_vit(), tmp_path / "built", **settings)
    order = np.random.default_rng(0).permutation(22).tolist()
    spec = make_spec(tiny_vit(), tmp_path / "written", **settings)

    def write(group):
        partial = PartialStore.begin(spec, group)
        for first in range(4 * group.rank, 20, 4 * group.size):  # the last two are missing
            write_rows(partial, order[first : first + 4])
        group.gather(None)
        return partial.finish()

    for store in on_every_process(processes, write):
        assert store.verify() and store.dataset[:] == built.dataset[:]
        assert len(store.manifest.shards) == processes
    assert [path.name for path in spec.directory.iterdir()] == [spec.path.name]


def test_reopened_directory_keeps_its_rows(tmp_path):
    spec = make_spec(tiny_vit(), tmp_path, Labelled(), collator=collate_labelled)
    first = PartialStore.begin(spec, Group())
    write_rows(first, [7, 3, 20])
    first.close()
    spec.source.dataset.rows, computed = 22, []
    again = PartialStore.reopen(spec, Group())
    run_prefix = spec.chain.prefix

    def count(inputs, cut):
        computed.append(len(inputs["pixel_values"]))
        return run_prefix(inputs, cut)

    spec.chain.prefix = count
    store = again.finish()
    assert sum(computed) == 19
    built = build(tiny_vit(), tmp_path / "built", Labelled(), collator=collate_labelled)
    assert store.dataset[:] == built.dataset[:]


@pytest.mark.parametrize("damaged", ["view-0.rows", "codec.safetensors", "spec.json", "marks"])
def test_damage_is_found_and_made_good(damaged, tmp_path, caplog):
    spec = make_spec(tiny_vit(), tmp_path)
    partial = PartialStore.begin(spec, Group())
    write_rows(partial, list(range(22)))
    partial.close()
    path = partial_path(spec.path) / damaged
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    again = PartialStore.reopen(spec, Group())
    if damaged in ("codec.safetensors", "spec.json"):
        assert again is None and "begun again" in messages(caplog) and not partial_path(spec.path).exists()
        again = PartialStore.begin(spec, Group())
    assert again.finish().dataset[:] == build(tiny_vit(), tmp_path / "built").dataset[:]


def test_row_without_its_line_is_computed_again(tmp_path):
    spec = make_spec(tiny_vit(), tmp_path, Labelled(), collator=collate_labelled)
    partial = PartialStore.begin(spec, Group())
    write_rows(partial, list(range(22)))
    partial.close()
    [lines] = partial_path(spec.path).glob("lists-*")
    lines.write_text(lines.read_text()[:-20])  # a killed process; its last line is cut short
    store = PartialStore.reopen(spec, Group()).finish()
    assert store.dataset["text"][:] == [f"ä {row}" for row in range(22)]


def test_directory_of_other_views_is_not_reopened(tmp_path):
    spec = make_spec(tiny_vit(), tmp_path)
    partial = PartialStore.begin(spec, Group())
    partial.close()
    (partial_path(spec.path) / "view-0.rows").write_bytes(b"")
    assert PartialStore.reopen(spec, Group()) is None
    assert PartialStore.reopen(replace(spec, views=ViewSpec(1)), Group()) is None


@pytest.mark.parametrize("processes", [1, 2])
def test_rows_written_in_any_order_become_the_store_of_a_build(processes, tmp_path):
    spec = pack(make_spec(tiny_vit(), tmp_path / "written"))
    built = materialize(replace(spec, directory=tmp_path / "built"), Group())
    order = np.random.default_rng(0).permutation(22).tolist()

    def write(group):
        partial = PartialStore.begin(spec, group)
        for first in range(4 * group.rank, 20, 4 * group.size):
            rows = order[first : first + 4]
            batch = spec.source.collate(rows)
            features = spec.chain.prefix({"pixel_values": batch.pop("pixel_values")}, spec.cut)
            partial.write(rows, np.zeros(len(rows), np.int64), ViewRun(batch, {}, features))
        group.gather(None)
        partial.close()
        partial = PartialStore.reopen(spec, group)
        return partial.finish()

    for store in on_every_process(processes, write):
        assert store.verify() and store.manifest.lossless and store.dataset[:] == built.dataset[:]
