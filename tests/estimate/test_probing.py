"""Measuring what a build costs and saves: nothing touched, and as little measured as a decision needs."""

from dataclasses import replace

import pytest
import torch
from support import images, zoo
from support.builds import Rows, collate, make_spec, make_text_spec, without_labels
from support.token_rows import Pad, Texts, bert
from support.untouched import assert_same, snapshot, with_gradients

from hf_freezecache import FreezeCacheConfig
from hf_freezecache.augment.geometry import DENSE, PROJECTIVE
from hf_freezecache.build.context import BuildContext
from hf_freezecache.build.survey import choose_channels
from hf_freezecache.cache.view_columns import ViewSpec
from hf_freezecache.distributed import Group
from hf_freezecache.estimate.costs import Work, decide
from hf_freezecache.estimate.pace import LEAST_BUILD_SECONDS, Pace
from hf_freezecache.estimate.probing import Prober
from hf_freezecache.estimate.trial_steps import TrialSteps


def make_prober(build, config=None, processes=1, **settings):
    context = BuildContext(
        chain=build.chain,
        source=build.source,
        config=FreezeCacheConfig() if config is None else config,
        cache_dir=build.directory,
        group=Group(0, processes),
        model_inputs=without_labels,
        precision="no",
    )
    return Prober(context, **settings)


def with_views(build, geometry=PROJECTIVE, count=1, channels=8):
    channel_count = build.layout.channels
    spec = ViewSpec(count, geometry, torch.arange(channels), torch.zeros(channel_count))
    return replace(build, views=spec)


@pytest.fixture
def pictures():
    return images.picture_dataset(40).with_transform(images.replayable())


def with_slow_prefix(build, clock, seconds):
    """The build; every run of its prefix moves the clock on, and nothing else does."""
    run = build.chain.prefix
    build.chain.prefix = lambda *given: clock(seconds) or run(*given)
    return build


@pytest.mark.parametrize("kind", ["none", PROJECTIVE, DENSE, "whole"])
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_probe_leaves_model_and_generators_alone(name, kind, pictures, tmp_path):
    model = zoo.make(name)
    build = make_spec(model, tmp_path, pictures if name == "vit" else Rows(22, 32), cut=2, codec="int8")
    if kind == "whole":
        build = replace(build, views=ViewSpec(2))
    elif kind != "none":
        build = with_views(build, kind)
    with_gradients(model)
    before = snapshot(model)
    costs = make_prober(build).measure(build, batches=2, with_suffix=True)
    assert_same(before, snapshot(model))
    assert list(tmp_path.iterdir()) == []
    seconds = [costs.load, costs.load_base, costs.prefix, costs.suffix, costs.encode, costs.read, costs.decode]
    assert min(seconds) > 0
    assert (costs.load_view > 0) == (kind != "none")
    assert (costs.compare > 0) == (kind in (PROJECTIVE, DENSE))


def test_a_build_of_texts_is_expected_to_run_less_padding_than_an_epoch(tmp_path, clock):
    build = make_text_spec(bert(), tmp_path, Texts(64, longest=30), Pad())
    run = build.chain.prefix
    build.chain.prefix = lambda inputs, cut: clock(inputs["input_ids"].numel()) or run(inputs, cut)
    prober = make_prober(build)
    costs = prober.measure(build, batches=8)
    assert costs.prefix_build < 0.75 * costs.prefix
    assert prober.why_hopeless(build, 1.0) is None  # a build may take less than what an epoch saves
    images = make_spec(zoo.make("vit"), tmp_path)
    assert make_prober(images).why_hopeless(images, 1.0) is not None


def test_probe_without_suffix_is_a_handful_of_prefix_runs(pictures, tmp_path):
    build = with_views(make_spec(zoo.make("vit"), tmp_path, pictures))
    prober, loaded, ran = make_prober(build), [], []
    draw, prefix = build.source.draw, build.chain.prefix
    build.source.draw = lambda rows, *rest, **named: loaded.append(rows) or draw(rows, *rest, **named)
    build.chain.prefix = lambda *given: ran.append(given) or prefix(*given)
    costs = prober.measure(build)
    assert costs.suffix is None and costs.peak_memory_bytes is None
    assert len(set(loaded)) <= 2 and len(loaded) <= 6
    assert len(ran) <= 5 + 2, "and two of the small build that is timed"
    prober.measure(build)
    assert len(loaded) <= 6


def test_hopeless_build_is_declined_without_loading_anything(pictures, tmp_path):
    build = make_spec(zoo.make("vit"), tmp_path, pictures)
    prober = make_prober(build)

    def never(*args):
        raise AssertionError("nothing may be measured")

    prober._load = prober._run_prefix = never
    for views, epochs in ((build, 1.0), (with_views(build), 2.0), (replace(build, views=ViewSpec(3)), 4.0)):
        reason, row = prober.refuse(views, epochs, limit=None)
        assert (
            "runs the frozen blocks over the data" in reason and "save as many runs at most" in reason and row is None
        )
    reason, row = prober.refuse(build, 100, limit=10)
    assert reason.startswith("it needs ") and "10 B are left" in reason and row is None


def test_what_is_hopeless_by_the_pace_of_live_epochs_is_declined_without_loading_anything(pictures, tmp_path):
    build = make_spec(zoo.make("vit"), tmp_path, pictures)
    prober = make_prober(build)
    pace = Pace(step=0.002, load=0.001, start=0.0, prefix_share=0.3)
    loaded, draw = [], build.source.draw
    build.source.draw = lambda rows, *rest, **named: loaded.append(rows) or draw(rows, *rest, **named)
    reason, row = prober.refuse(build, 5.0, None, pace)
    assert "5 epochs left take about 100 ms" in reason and row is None and loaded in ([], [range(0, 2)])
    prober.refuse(build, 500.0, None, pace)
    assert loaded


def test_what_was_measured_to_build_is_not_measured_again(pictures, tmp_path, clock):
    build = with_slow_prefix(make_spec(zoo.make("vit"), tmp_path, pictures), clock, 0.05)
    prober = make_prober(build)
    _, row = prober.refuse(build, 10.0, limit=None)
    loaded, draw = [], build.source.draw
    build.source.draw = lambda rows, *rest, **named: loaded.append(rows) or draw(rows, *rest, **named)
    assert prober.refuse(build, 10.0, limit=10**9) == (None, replace(row, limit=10**9)) and not loaded
    assert prober.refuse(with_views(build), 100.0, limit=10**9)[0] is None and loaded


def test_loader_processes_are_not_started_to_decide_where_live_epochs_have_shown_it(
    pictures, tmp_path, clock, monkeypatch
):
    build = with_slow_prefix(make_spec(zoo.make("vit"), tmp_path, pictures, num_workers=2), clock, 0.05)

    def start(numbers):
        raise AssertionError("loader processes were started")

    monkeypatch.setattr(build.source, "loader", start)
    pace = Pace(step=0.1, load=0.0, start=0.25, prefix_share=0.5)
    reason, row = make_prober(build).refuse(build, 10.0, None, pace)
    assert reason is None and row.build_seconds == pytest.approx(10 * 0.05 + LEAST_BUILD_SECONDS + 2 * 0.25)


def test_build_of_a_slow_prefix_is_accepted_and_of_a_fast_one_declined(pictures, tmp_path, clock):
    """10 ranges of 4 samples; a run of the prefix takes 0.05 s, and all the rest takes no time."""
    slow = with_slow_prefix(make_spec(zoo.make("vit"), tmp_path, pictures), clock, 0.05)
    reason, row = make_prober(slow).refuse(slow, 3.0, limit=None)
    assert reason is None
    assert row.build_seconds == pytest.approx(10 * 0.05 + LEAST_BUILD_SECONDS)
    assert row.seconds_saved_per_epoch == pytest.approx(9 * 0.05), "sentinel rows run in replay epochs too"

    views = with_views(slow)
    prober = make_prober(views, FreezeCacheConfig(sensitivity_batches=10))
    reason, row = prober.refuse(views, 4.1, limit=None)
    assert "would save" in reason, "two runs of everything, and two more to compare"
    assert row.build_seconds == pytest.approx(4 * 10 * 0.05 + LEAST_BUILD_SECONDS)
    reason, row = prober.refuse(views, 40.0, limit=None)
    assert reason is None and decide(row, 40.0) is None

    fast = make_spec(zoo.make("vit"), tmp_path, pictures)
    reason, row = make_prober(fast).refuse(fast, 1000.0, limit=None)
    assert "no faster" in reason and row.seconds_saved_per_epoch == 0


def test_declined_early_measures_neither_encoding_nor_replay(pictures, tmp_path, clock):
    build = with_slow_prefix(make_spec(zoo.make("vit"), tmp_path, pictures), clock, 0.01)
    prober = make_prober(build)

    def never(*args):
        raise AssertionError("the prefix alone settles it")

    prober._encode = prober._time_replay = never
    # A build takes 0.1 s and what it takes once; 1.9 epochs save no more than 0.19 s, which is not worth it.
    reason, row = prober.refuse(build, 1.9, limit=None)
    assert "would save" in reason and row.build_seconds == pytest.approx(0.1 + LEAST_BUILD_SECONDS)


def test_work_counts_what_a_build_does(pictures, tmp_path):
    build = make_spec(zoo.make("vit"), tmp_path, pictures, batch_size=6)
    prober = make_prober(build, FreezeCacheConfig(sensitivity_batches=3), processes=2)
    assert prober.work(build) == Work(ranges=40 / 6, processes=2)
    assert prober.work(with_views(build, count=2)) == Work(40 / 6, views=2, views_run=2, compared=3, processes=2)
    assert prober.work(replace(build, views=ViewSpec(1))) == Work(40 / 6, views=1, views_run=1, processes=2)
    stem = with_views(make_spec(zoo.make("resnet"), tmp_path, Rows(8, 32), cut=2), channels=0)
    assert make_prober(stem).work(stem).views_run == 0


def test_build_that_memory_cannot_hold_is_run_twice_in_part(pictures, tmp_path, monkeypatch):
    build = make_spec(zoo.make("vit"), tmp_path, pictures)
    assert make_prober(build).work(build).run_twice == 0
    batch_bytes = 4 * build.layout.values * 4
    monkeypatch.setattr("hf_freezecache.build.materialize._FIT_BYTES", 3 * batch_bytes)
    views = replace(build, views=ViewSpec(1))
    assert make_prober(build).work(build).run_twice == 0
    assert make_prober(views).work(views).run_twice == 2
    lossless = replace(views, codec="fp16")
    assert make_prober(views).work(lossless).run_twice == 0


def test_labels_of_any_kind_are_kept_by_the_probe(tmp_path):
    dataset = Rows(12, label=lambda row: f"class {row}")
    build = make_spec(zoo.make("vit"), tmp_path, dataset, collator=collate)
    assert make_prober(build).measure(build).encode > 0


class SlowRows(Rows):
    """Every row moves the clock on by 0.05 s."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def __getitem__(self, row):
        self.clock(0.05)
        return super().__getitem__(row)


def test_training_that_waits_for_its_loader_is_measured_with_its_steps(tmp_path, clock):
    """Behind loader processes a prefix costs nothing, if loading takes longer: what is saved depends on the rest."""
    build = with_slow_prefix(make_spec(zoo.make("vit"), tmp_path, SlowRows(clock), num_workers=1), clock, 0.01)

    def loss(model, inputs):
        clock(0.03)
        return model(**inputs).logits.sum()

    prober = make_prober(build, steps=TrialSteps(build.chain, loss=loss))
    costs = prober.measure(build)
    assert (costs.load, costs.prefix, costs.suffix) == pytest.approx((4 * 0.05, 0.01, 0.03))
    row = prober.row(build, costs)
    assert row.live_step_seconds == costs.load
    assert row.replay_step_seconds == max(costs.read, costs.decode + costs.suffix) == pytest.approx(0.03)
    fast = with_slow_prefix(make_spec(zoo.make("vit"), tmp_path, SlowRows(clock), num_workers=100), clock, 0.01)
    assert make_prober(fast).measure(fast).suffix is None


@pytest.mark.parametrize(("compared", "maps"), [(2, 0), (10, 2)])
def test_linear_maps_are_expected_where_they_will_be_fitted(compared, maps, tmp_path):
    """A map of 8 channels has 75 inputs and needs 300 positions a half, 4 views of 64 positions have 256."""
    dataset = images.picture_dataset(40, 32).with_transform(images.replayable(size=32))
    build = with_views(make_spec(zoo.make("resnet"), tmp_path, dataset, cut=3), channels=2)
    config = FreezeCacheConfig(sensitivity_batches=compared)
    prober = make_prober(build, config)
    assert build.layout.channels == 8 and build.layout.positions == 64
    assert prober._count_maps(build, prober._load(build, 2)) == maps
    settled = choose_channels(build, config.similarity, compared, channel_map=True)
    assert (settled.views.channel_maps is not None) == bool(maps)
    without = make_prober(build, FreezeCacheConfig(channel_map=False))
    assert without._count_maps(build, without._load(build, 2)) == 0


def test_what_a_build_costs_once_is_measured_for_a_plan_and_not_to_decide(pictures, tmp_path, clock, monkeypatch):
    """Files that take 2 s to be made durable, and loader processes that take 3 s to start."""
    from hf_freezecache.build import materialize as building
    from hf_freezecache.estimate import fixed_costs

    spec = with_slow_prefix(make_spec(zoo.make("vit"), tmp_path, pictures), clock, 0.05)
    complete = building.complete_store
    monkeypatch.setattr(building, "complete_store", lambda *given: clock(2.0) or complete(*given))
    before = sorted(tmp_path.rglob("*"))
    prober = make_prober(spec)
    row = prober.row(spec, prober.measure(spec))
    assert row.build_seconds == pytest.approx(10 * 0.05 + 2.0)
    reason, row = make_prober(spec).refuse(spec, 100.0, limit=None)
    assert reason is None and row.build_seconds == pytest.approx(10 * 0.05 + LEAST_BUILD_SECONDS)
    assert sorted(tmp_path.rglob("*")) == before

    workers = fixed_costs.worker_start_seconds
    spec.source.num_workers = 2
    monkeypatch.setattr(spec.source, "loader", lambda numbers: iter([clock(3.0)]))
    assert workers(spec.source, load=0.5) == 2.5
    spec.source.num_workers = 0
    assert workers(spec.source, load=0.5) == 0
