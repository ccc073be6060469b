"""Which store a training gets: budget, coarser codecs, the store before, and what a resume remembers."""

import json
import shutil

import pytest
import torch
from support.builds import make_spec
from support.helpers import assert_same_weights, losses, manual, pixel_dataset, run, tiny_vit, weights
from support.largest_total import LargestTotal, total_bytes
from support.packed_stores import flat_pixels, flat_vit, pack, stores_of, train_on_rows
from support.sessions import session_of

from hf_freezecache import FeatureStore
from hf_freezecache.build.sizing import estimate_bytes
from hf_freezecache.training.callback import STATE_VERSION


def train(tmp_path, points="1:2", name="run", **settings):
    own = {key: settings.pop(key) for key in ("num_train_epochs", "save_strategy", "resume") if key in settings}
    config = manual(points, **{"cache": "always", **settings})
    return run(tiny_vit(), pixel_dataset(), tmp_path / name, config, **own)


def stores(tmp_path, name="run") -> dict[int, FeatureStore]:
    folder = tmp_path / name / "_freeze_cache"
    found = [FeatureStore.open(path) for path in folder.iterdir() if ".tmp" not in path.name]
    return {store.manifest.cut: store for store in found}


def test_codec_follows_the_progression(tmp_path):
    trainer = train(tmp_path, "1:2,2:3", progressive="0.5:int8,0.75:int4")
    assert trainer.freeze_status().cut == 3
    assert stores(tmp_path)[3].manifest.codec == "int4"
    first = train(tmp_path, "1:2", name="first", codec="int8").freeze_status().store_bytes
    last = train(tmp_path, "1:3", name="last", codec="int4").freeze_status().store_bytes
    built = {phase.cut: phase.store_bytes for phase in trainer.freeze_cache_report().phases if phase.mode == "build"}
    assert built == {2: first, 3: last} and first > last


def test_store_of_the_cut_before_is_removed_when_the_deeper_one_is_complete(tmp_path):
    folder = tmp_path / "run" / "_freeze_cache"
    with LargestTotal(folder) as watched:
        train(tmp_path, "1:2,2:3")
    assert list(stores(tmp_path)) == [3]
    assert watched.largest > 1.9 * total_bytes(folder), "for a moment both are there"


def test_store_of_somebody_else_stays(tmp_path):
    train(tmp_path, "0:2", name="other", feature_cache_dir=str(tmp_path / "cache"))
    other = {path.name for path in (tmp_path / "cache").iterdir()}
    train(tmp_path, "0:2,2:3", feature_cache_dir=str(tmp_path / "cache"))
    assert other < {path.name for path in (tmp_path / "cache").iterdir()}


def test_budget_of_half_the_bytes_is_kept_at_every_moment_by_a_coarser_codec(tmp_path):
    train(tmp_path, name="free", codec="int8")
    needed = total_bytes(tmp_path / "free" / "_freeze_cache")
    budget = needed * 3 // 4
    folder = tmp_path / "run" / "_freeze_cache"
    with LargestTotal(folder) as watched:
        trainer = train(tmp_path, codec="int8", cache_budget=str(budget))
    assert trainer.freeze_status().replaying
    assert stores(tmp_path)[2].manifest.codec in ("int4", "int3")
    assert 0 < watched.largest <= budget


def test_budget_of_exactly_the_needed_bytes_is_enough_and_one_byte_less_is_not(tmp_path):
    train(tmp_path, name="free", codec="int3")
    needed = total_bytes(tmp_path / "free" / "_freeze_cache")
    assert train(tmp_path, name="enough", codec="int3", cache_budget=str(needed)).freeze_status().replaying
    declined = train(tmp_path, name="less", codec="int3", cache_budget=str(needed - 1))
    assert not declined.freeze_status().replaying
    assert declined.freeze_status().cut == 2
    assert total_bytes(tmp_path / "less" / "_freeze_cache") == 0


def test_store_before_goes_first_where_the_budget_does_not_hold_both(tmp_path):
    train(tmp_path, name="free")
    needed = total_bytes(tmp_path / "free" / "_freeze_cache")
    budget = int(needed * 1.3)
    folder = tmp_path / "run" / "_freeze_cache"
    with LargestTotal(folder) as watched:
        trainer = train(tmp_path, "1:2,2:3", cache_budget=str(budget))
    assert trainer.freeze_status().replaying
    assert {cut: store.manifest.codec for cut, store in stores(tmp_path).items()} == {3: "int4"}
    assert needed <= watched.largest <= budget


@pytest.mark.parametrize("stop", [8, 12])
def test_resume_keeps_codec_and_stores_of_a_budget(stop, tmp_path):
    train(tmp_path, name="free", codec="int8")
    budget = str(total_bytes(tmp_path / "free" / "_freeze_cache") * 3 // 4)
    settings = {"codec": "int8", "cache_budget": budget, "points": "1:2,3:3"}
    whole = run(
        tiny_vit(),
        pixel_dataset(),
        tmp_path / "whole",
        manual(settings["points"], cache="always", codec="int8", cache_budget=budget),
        save_strategy="steps",
        save_steps=2,
        num_train_epochs=5,
    )
    resumed = run(
        tiny_vit(1),
        pixel_dataset(),
        tmp_path / "whole",
        manual(settings["points"], cache="always", codec="int8", cache_budget=budget),
        resume=str(tmp_path / "whole" / f"checkpoint-{stop}"),
        save_strategy="no",
        num_train_epochs=5,
    )
    assert losses(resumed) == losses(whole)
    assert_same_weights(weights(resumed), weights(whole))
    assert len(stores(tmp_path, "whole")) == 1


def test_decisions_stand_in_the_checkpoint(tmp_path):
    trainer = run(tiny_vit(), pixel_dataset(), tmp_path / "run", manual("1:2", cache="always"), save_strategy="epoch")
    checkpoint = max((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    attributes = state["stateful_callbacks"]["FreezeCallback"]["attributes"]
    assert attributes["version"] == STATE_VERSION
    store = trainer.freeze_status().store_path.name
    assert attributes["session"]["stores"]["decisions"] == {
        "2": {"codec": "int4", "store": store, "parent": None, "written": False}
    }
    assert attributes["session"]["source"] == {"kind": "store", "cut": 2}


def test_deeper_store_comes_from_the_one_before_if_that_is_wanted(tmp_path):
    trainer = train(tmp_path, "1:2,2:3", deepen="cache", codec="int8")
    store = stores(tmp_path)[3]
    assert len(store.manifest.made_from["deepened_from"]) == 32
    assert list(stores(tmp_path)) == [3]
    builds = {phase.cut: phase.flops for phase in trainer.freeze_cache_report().phases if phase.mode == "build"}
    blocks = {cut: session_of(trainer).meter.per_sample("build", cut) * 32 for cut in (2, 3)}
    assert builds == {2: blocks[2], 3: pytest.approx(blocks[3] - blocks[2])}


def test_exact_deepening_is_the_same_training_as_building_from_images(tmp_path):
    settings = dict(points="1:2,2:3", codec="fp32")
    deepened = train(tmp_path, name="deepened", deepen="cache", **settings)
    raw = train(tmp_path, name="raw", **settings)
    assert losses(deepened) == losses(raw)
    assert_same_weights(weights(deepened), weights(raw))


@pytest.mark.parametrize(("stop", "lost"), [(4, True), (6, False), (8, False), (8, True), (10, False), (10, True)])
def test_resume_of_a_deepened_store_is_exact_even_if_all_stores_are_gone(stop, lost, tmp_path):
    def go(**settings):
        config = manual("1:2,2:3", cache="always", deepen="cache", codec="int4")
        return run(tiny_vit(stop), pixel_dataset(), tmp_path / "run", config, **settings)

    whole = go(save_strategy="steps", save_steps=2)
    if lost:
        shutil.rmtree(tmp_path / "run" / "_freeze_cache")
    resumed = go(resume=str(tmp_path / "run" / f"checkpoint-{stop}"))
    assert losses(resumed) == losses(whole)
    assert_same_weights(weights(resumed), weights(whole))


def test_budget_that_does_not_hold_both_builds_from_images(tmp_path, caplog):
    train(tmp_path, name="free")
    budget = int(total_bytes(tmp_path / "free" / "_freeze_cache") * 1.3)
    train(tmp_path, "1:2,2:3", deepen="cache", cache_budget=str(budget))
    assert "deepened_from" not in stores(tmp_path)[3].manifest.made_from
    assert "are deleted before the one of cut 3 is built" in caplog.text


@pytest.mark.parametrize("lost", [False, True])
def test_resume_of_mixed_bits_is_exact_though_the_suffix_has_learnt(lost, tmp_path):
    def go(**settings):
        config = manual("1:2", cache="always", codec="mixed@3")
        return run(tiny_vit(), pixel_dataset(), tmp_path / "run", config, **settings)

    whole = go(save_strategy="steps", save_steps=4)
    if lost:
        shutil.rmtree(tmp_path / "run" / "_freeze_cache")
    resumed = go(resume=str(tmp_path / "run" / "checkpoint-12"))
    assert losses(resumed) == losses(whole)
    assert_same_weights(weights(resumed), weights(whole))


@pytest.mark.slow
def test_resume_that_finds_the_store_of_the_killed_run_still_makes_room(tmp_path):
    train(tmp_path, name="free")
    budget = str(int(total_bytes(tmp_path / "free" / "_freeze_cache") * 1.3))

    def go(**settings):
        config = manual("1:2,2:3", cache="always", cache_budget=budget)
        return run(tiny_vit(), pixel_dataset(), tmp_path / "run", config, **settings)

    whole = go(save_strategy="steps", save_steps=2)
    shutil.rmtree(tmp_path / "run" / "_freeze_cache")
    # Killed after the first store was built, resumed from before: it is not the resumed training's own.
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    run(tiny_vit(), pixel_dataset(), tmp_path / "run", manual("1:2", cache="always"), resume=checkpoint)
    resumed = go(resume=checkpoint)
    assert losses(resumed) == losses(whole)
    assert 3 in stores(tmp_path)


def test_store_that_cannot_be_removed_costs_nothing(tmp_path, monkeypatch, caplog):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("hf_freezecache.training.store_provider.remove_store", refuse)
    trainer = train(tmp_path, "1:2,2:3")
    assert trainer.freeze_status().replaying and sorted(stores(tmp_path)) == [2, 3]
    assert "could not be deleted" in caplog.text


def test_measurement_that_fails_declines(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("hf_freezecache.estimate.probing.Prober.refuse", fail)
    monkeypatch.setattr("hf_freezecache.training.worth.StoreWorth.why_hopeless", lambda *_: None)
    trainer = train(tmp_path, cache="auto")
    assert trainer.freeze_status().cut == 2 and not trainer.freeze_status().replaying
    assert "could not be measured: out of memory" in caplog.text


def test_coarser_codec_that_cannot_hold_the_values_gives_way_to_the_next(tmp_path, caplog):
    model = tiny_vit()
    # Beyond float16's range where codes reach: the special token alone is kept in float16 by the integer codecs.
    with torch.no_grad():
        model.vit.embeddings.position_embeddings[:, 1:] += 1e6
    probe = run(model, pixel_dataset(), tmp_path / "free", manual("1:1", cache="always", codec="fp32"))
    budget = str(probe.freeze_status().store_bytes * 2 // 3)
    trainer = run(
        model, pixel_dataset(), tmp_path / "run", manual("1:1", cache="always", codec="fp32", cache_budget=budget)
    )
    assert trainer.freeze_status().replaying
    assert stores(tmp_path)[1].manifest.codec == "int8"


def test_outdated_evaluation_stores_make_room_for_a_deeper_cut(tmp_path):
    def go(name, **settings):
        config = manual("0:2,2:3", cache="always", cache_eval=True, **settings)
        data = pixel_dataset()
        return run(tiny_vit(), data, tmp_path / name, config, eval_dataset=data, eval_strategy="epoch")

    largest = go("free", codec="int8")
    held = {path.name: total_bytes(path) for path in (tmp_path / "free" / "_freeze_cache").iterdir()}
    assert len(held) == 2  # of the last cut alone: one for training, one for evaluation
    trainer = go("run", codec="int8", cache_budget=str(sum(held.values())))
    assert FeatureStore.open(trainer.freeze_status().store_path).manifest.codec == "int8"
    assert trainer.freeze_status().store_bytes == largest.freeze_status().store_bytes


def test_budget_counts_what_lies_on_the_disk_once_a_store_is_built(tmp_path):
    dataset = flat_pixels()
    free = train_on_rows(tmp_path / "free", True, dataset, model=flat_vit(), points="0:2", codec="fp32")
    store = stores_of(free)[2]
    entries = session_of(free).keeper.provider.holdings.state_dict()
    assert [entry["bytes"] for entry in entries] == [store.total_bytes]
    needed = estimate_bytes(pack(make_spec(tiny_vit(), tmp_path, dataset, codec="fp32", batch_size=8)))
    assert 2 * store.total_bytes < needed
    # It would fit once it is packed; that is not known before, and a budget is never passed.
    budget = dict(cache_budget=str(needed), codec="fp32", points="0:2")
    declined = train_on_rows(tmp_path / "budget", True, dataset, model=flat_vit(), **budget)
    assert stores_of(declined)[2].manifest.codec == "fp16"
    enough = dict(cache_budget=str(2 * needed), codec="fp32", points="0:2")
    assert (
        stores_of(train_on_rows(tmp_path / "enough", True, dataset, model=flat_vit(), **enough))[2].manifest.codec
        == "fp32"
    )
