"""Writing a store through live epochs: what is drawn, what a directory keeps, and what happens when it cannot."""

import errno
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.builds import Rows, build, collate, make_spec, on_every_process
from support.helpers import assert_same_weights, losses, make_args, manual, pixel_dataset, run, tiny_vit, weights
from support.images import FlipAndErase, OpaqueFlip, picture_dataset, pictures_with_a_marked_one, replayable
from support.sessions import chain_of
from torch.utils.data import DataLoader
from transformers import TrainerCallback, default_data_collator

from hf_freezecache import FreezeCacheTrainer
from hf_freezecache.augment.draws import Draw, use_draw
from hf_freezecache.augment.geometry import PROJECTIVE
from hf_freezecache.build.feature_sources import ViewRun
from hf_freezecache.build.partial import PartialStore, partial_path
from hf_freezecache.cache.store import FeatureStore
from hf_freezecache.cache.view_columns import ViewSpec
from hf_freezecache.distributed import Group
from hf_freezecache.replay.collator import ReplayCollator, take_codes, take_drawn
from hf_freezecache.replay.dataset import ReplayDataset, SourceSwitch, WriteRound, rotate_views

SETTINGS = dict(num_train_epochs=4, remove_unused_columns=False)


def through(points="0:2", **settings):
    return manual(points, **{"cache": "always", "materialize": "write_through", **settings})


def messages(caplog) -> str:
    return "\n".join(record.message for record in caplog.records)


# What is drawn


@pytest.mark.parametrize("views", [0, 1, 3])
def test_rounds_draw_each_view_of_a_sample_once(views):
    drawn = np.stack([rotate_views(3, WriteRound(number, views), range(200)) for number in range(views + 1)])
    assert (np.sort(drawn, axis=0) == np.arange(views + 1)[:, None]).all()
    if views:
        assert all(np.bincount(of_round, minlength=views + 1).min() > 20 for of_round in drawn)


def test_views_drawn_side_by_side_are_the_views_drawn_alone():
    dataset = picture_dataset(6).with_transform(replayable())
    samples, views = [4, 1, 3, 0], [1, 0, 2, 1]
    with use_draw(Draw(7, samples, view=views, geometry=(PROJECTIVE, (4, 4)))) as together:
        rows = dataset.__getitems__(samples)
    geometries = iter(together.geometries)
    for sample, view, row in zip(samples, views, rows, strict=True):
        with use_draw(Draw(7, [sample], view=view, geometry=(PROJECTIVE, (4, 4)))) as alone:
            [expected] = dataset.__getitems__([sample])
        assert torch.equal(row["pixel_values"], expected["pixel_values"])
        assert all(torch.equal(next(geometries), geometry) for geometry in alone.geometries)
    assert len(together.geometries) == 3


def test_drawing_refuses_another_number_of_views_than_samples():
    with pytest.raises(ValueError, match="got 1 views for 2 samples"):
        Draw(0, [1, 2], view=[1])


def test_switch_keeps_a_round_until_it_is_set():
    switch = SourceSwitch()
    for round in (WriteRound(1, 2, (PROJECTIVE, (3, 5))), WriteRound(0, 0)):
        switch.write(round)
        assert switch.round == round and switch.path is None
    switch.set(None)
    assert switch.round is None


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_says_which_views_its_batches_are(workers):
    dataset = picture_dataset(10).with_transform(replayable())
    switch = SourceSwitch()
    loader = DataLoader(
        ReplayDataset(dataset, switch, seed=3),
        batch_size=4,
        collate_fn=ReplayCollator(default_data_collator),
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    assert all(take_drawn(batch) is None for batch in loader)
    for number in range(2):
        round = WriteRound(number, 1, (PROJECTIVE, (4, 4)))
        switch.write(round)
        for batch in loader:
            drawn, inputs = take_drawn(batch)
            assert take_codes(batch) is None and sorted(inputs) == ["labels", "pixel_values"]
            assert drawn.views.tolist() == rotate_views(3, round, drawn.numbers.tolist()).tolist()
            assert drawn.geometry.shape == (len(drawn.views), 8) and drawn.refused is None
            assert (drawn.geometry.abs().sum(1) > 0).tolist() == (drawn.views > 0).tolist()
    switch.set(None)
    assert all(take_drawn(batch) is None for batch in loader)


def test_rows_fetched_one_by_one_are_rows_fetched_together():
    switch = SourceSwitch()
    switch.write(WriteRound(0, 1, (PROJECTIVE, (4, 4))))
    dataset = ReplayDataset(picture_dataset(6).with_transform(replayable()), switch, seed=3)
    collator = ReplayCollator(default_data_collator)
    together, alone = collator(dataset.__getitems__([2, 5, 1])), collator([dataset[row] for row in (2, 5, 1)])
    assert together.keys() == alone.keys() and all(torch.equal(together[name], alone[name]) for name in together)


# What the directory keeps


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
    path = partial_path(spec) / damaged
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    again = PartialStore.reopen(spec, Group())
    if damaged in ("codec.safetensors", "spec.json"):
        assert again is None and "begun again" in messages(caplog) and not partial_path(spec).exists()
        again = PartialStore.begin(spec, Group())
    assert again.finish().dataset[:] == build(tiny_vit(), tmp_path / "built").dataset[:]


def test_row_without_its_line_is_computed_again(tmp_path):
    spec = make_spec(tiny_vit(), tmp_path, Labelled(), collator=collate_labelled)
    partial = PartialStore.begin(spec, Group())
    write_rows(partial, list(range(22)))
    partial.close()
    [lines] = partial_path(spec).glob("lists-*")
    lines.write_text(lines.read_text()[:-20])  # a killed process; its last line is cut short
    store = PartialStore.reopen(spec, Group()).finish()
    assert store.dataset["text"][:] == [f"ä {row}" for row in range(22)]


def test_directory_of_other_views_is_not_reopened(tmp_path):
    spec = make_spec(tiny_vit(), tmp_path)
    partial = PartialStore.begin(spec, Group())
    partial.close()
    (partial_path(spec) / "view-0.rows").write_bytes(b"")
    assert PartialStore.reopen(spec, Group()) is None
    assert PartialStore.reopen(replace(spec, views=ViewSpec(1)), Group()) is None


# Trainings


def test_status_and_report_tell_the_writing_epochs(tmp_path, caplog):
    seen = []

    class Look(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            seen.append((self.trainer.freeze_status().replaying, self.trainer.freeze_status().store_bytes > 0))

    look = Look()
    trainer = FreezeCacheTrainer(
        model=tiny_vit(),
        args=make_args(tmp_path, **SETTINGS),
        train_dataset=picture_dataset().with_transform(replayable()),
        freeze_cache=through(),
        callbacks=[look],
    )
    look.trainer = trainer
    trainer.train()
    assert seen == [(False, False), (False, False), (True, True), (True, True)]
    phases = {phase.mode: phase for phase in trainer.freeze_cache_report().phases}
    assert {mode: phase.epochs for mode, phase in phases.items()} == {"build": 1, "live": 2, "replay": 2}
    assert phases["live"].store_bytes > 0 and phases["build"].store_bytes == trainer.freeze_status().store_bytes
    assert phases["replay"].flops < phases["live"].flops
    assert "Built the feature store" in messages(caplog)


def test_too_few_epochs_build_upfront_and_say_so(tmp_path, caplog):
    dataset = picture_dataset().with_transform(replayable())
    late = run(tiny_vit(), dataset, tmp_path / "w", through("2:2"), **SETTINGS)
    upfront = run(tiny_vit(), dataset, tmp_path / "u", through("2:2", materialize="upfront"), **SETTINGS)
    assert losses(late) == losses(upfront)
    assert "built upfront, not written by training epochs: writing it takes 2 epochs, and 2 remain" in messages(caplog)
    assert late.freeze_status().replaying
    assert [phase.epochs for phase in late.freeze_cache_report().phases if phase.mode == "build"] == [1]


def test_next_freeze_gives_an_unfinished_store_up(tmp_path):
    dataset = picture_dataset().with_transform(replayable())
    trainer = run(tiny_vit(), dataset, tmp_path, through("0:2,1:3"), **SETTINGS)
    assert trainer.freeze_status().replaying and trainer.freeze_status().cut == 3
    [path] = (tmp_path / "_freeze_cache").iterdir()
    assert FeatureStore.open(path).manifest.cut == 3


def test_finished_stores_are_replayed_at_once(tmp_path):
    dataset = picture_dataset().with_transform(replayable())
    for materialize in ("write_through", "upfront"):
        cache = dict(feature_cache_dir=str(tmp_path / materialize))
        first = run(tiny_vit(), dataset, tmp_path / "1", through(materialize=materialize, **cache), **SETTINGS)
        second = run(tiny_vit(), dataset, tmp_path / "2", through(**cache), **SETTINGS)
        assert second.freeze_status() == first.freeze_status()
        assert [phase.mode for phase in second.freeze_cache_report().phases] == ["build", "replay"]


def test_opaque_draws_are_stored_as_they_were_trained_on(tmp_path):
    pictures = picture_dataset()
    trainer = run(tiny_vit(), pictures.with_transform(OpaqueFlip()), tmp_path, through(codec="fp32"), **SETTINGS)
    store = FeatureStore.open(trainer.freeze_status().store_path)
    assert store.views.spec.whole and store.views.spec.own_inputs and store.manifest.views == 1
    chain, rows = chain_of(trainer), np.arange(32)
    both = [store.codec.decode(store.read_rows(rows, np.full(32, view))) for view in (0, 1)]
    images = torch.stack([replayable().base(image) for image in pictures["image"]])
    plain, mirrored = [chain.prefix({"pixel_values": drawn}, 2) for drawn in (images, images.flip(-1))]
    for view in both:
        same = [(part - view).abs().flatten(1).amax(1) < 1e-5 for part in (plain, mirrored)]
        assert (same[0] ^ same[1]).all() and same[0].any() and same[1].any()


def rare_misfit():
    return pictures_with_a_marked_one(49).with_transform(replayable(FlipAndErase()))


def test_misfit_on_the_way_builds_upfront(tmp_path, caplog):
    """The erased picture is not among those that the channels are chosen on."""
    trainer = run(tiny_vit(), rare_misfit(), tmp_path, through(sensitivity_batches=1), **SETTINGS)
    assert "is built upfront, not written by training epochs, because the geometry of a view" in messages(caplog)
    assert trainer.freeze_status().replaying
    [path] = (tmp_path / "_freeze_cache").iterdir()
    store = FeatureStore.open(path)
    assert store.manifest.geometry == "dense" and "materialize" not in store.manifest.made_from


@pytest.mark.parametrize("when", ["reserving", "writing", "finishing"])
def test_full_disk_trains_live(when, tmp_path, caplog, monkeypatch):
    calls = []

    def full(*args):
        calls.append(args)
        if when == "writing" and len(calls) < 20:
            return pwrite(*args)
        raise OSError(errno.ENOSPC, "No space left on device")

    pwrite = os.pwrite
    if when == "finishing":
        monkeypatch.setattr("hf_freezecache.build.partial.ShardWriter", full)
    else:
        monkeypatch.setattr(os, "posix_fallocate" if when == "reserving" else "pwrite", full)
    dataset = pixel_dataset()
    through_full = run(tiny_vit(), dataset, tmp_path / "w", through("1:2"))
    live = run(tiny_vit(), dataset, tmp_path / "f", manual("1:2", cache="never"))
    assert losses(through_full) == losses(live)
    assert_same_weights(weights(through_full), weights(live))
    assert len(re.findall("No space left on device", messages(caplog))) == 1
    assert not any((tmp_path / "w" / "_freeze_cache").iterdir()) and not through_full.freeze_status().replaying


@pytest.mark.parametrize("step", [5, 7])
def test_resumed_after_a_misfit_is_uninterrupted(step, tmp_path):
    config = through(sensitivity_batches=1)

    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == step

    whole = run(tiny_vit(), rare_misfit(), tmp_path / "run", config, callbacks=[Save()], **SETTINGS)
    shutil.rmtree(tmp_path / "run" / "_freeze_cache")
    resumed = run(tiny_vit(seed=7), rare_misfit(), tmp_path / "run", config, resume=True, **SETTINGS)
    assert losses(resumed) == losses(whole)
    assert_same_weights(weights(resumed), weights(whole))
