"""Plans of real models on real loaders: bytes to the byte, nothing touched, and builds that are declined."""

import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import helpers, images, zoo
from support.builds import Rows, collate, make_spec
from torchvision.transforms import v2
from transformers import BertConfig, BertForSequenceClassification

from hf_freezecache import FreezeCacheConfig, plan
from hf_freezecache.augment.geometry import DENSE, PROJECTIVE
from hf_freezecache.build.survey import choose_channels
from hf_freezecache.cache.view_columns import ViewSpec
from hf_freezecache.estimate.costs import Work, decide
from hf_freezecache.estimate.probing import Prober
from hf_freezecache.estimate.trial_steps import TrialSteps
from hf_freezecache.model.chain import ChainError
from hf_freezecache.rng import preserve_rng


def snapshot(model):
    """Everything of a model and of the process that probing must leave alone."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "buffers": {name: value.clone() for name, value in model.named_buffers()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: [len(value) for key, value in vars(module).items() if key.endswith("_hooks")]
            for name, module in model.named_modules()
        },
        "forwards": [name for name, module in model.named_modules() if "forward" in vars(module)],
        "random": [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().clone()],
    }


def assert_same(first, second):
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for name in first:
            assert_same(first[name], second[name])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


def with_gradients(model):
    """As in the middle of an accumulation, with one parameter that the user has frozen."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    frozen.grad = None
    return model.train()


def make_prober(build, config=None, **settings):
    config = FreezeCacheConfig() if config is None else config
    return Prober(
        build.chain, build.source, lambda batch: {"pixel_values": batch["pixel_values"]}, config=config, **settings
    )


def with_views(build, geometry=PROJECTIVE, count=1, channels=8):
    channel_count = build.layout.channels
    spec = ViewSpec(count, geometry, torch.arange(channels), torch.zeros(channel_count))
    return replace(build, views=spec)


@pytest.fixture
def pictures():
    return images.picture_dataset(40).with_transform(images.replayable())


# Plans


@pytest.mark.parametrize("model", ["resnet", "vit"])
def test_plan_leaves_model_generators_and_disk_alone(model, pictures, tmp_path):
    network = helpers.tiny_resnet() if model == "resnet" else helpers.tiny_vit()
    with_gradients(network)
    torch.manual_seed(5)
    before = snapshot(network)
    args = helpers.make_args(tmp_path / "output", remove_unused_columns=False)
    config = FreezeCacheConfig(feature_cache_dir=str(tmp_path / "stores"))
    found = plan(network, pictures, config, args=args, batches=2)
    assert_same(before, snapshot(network))
    assert list(tmp_path.iterdir()) == []
    assert [row.cut for row in found.rows] == list(range(1, len(found.rows) + 1))


def test_plan_has_a_row_a_cut_with_everything_in_it(tmp_path):
    model = helpers.tiny_vit()
    args = helpers.make_args(tmp_path)
    found = plan(model, helpers.pixel_dataset(24), args=args, batches=1)
    assert [(row.cut, row.block, row.codec) for row in found.rows] == [
        (1, "vit.embeddings", "int4"),
        (2, "vit.layers.0", "int4"),
        (3, "vit.layers.1", "int4"),
        (4, "vit.layers.2", "int4"),
    ]
    for row in found.rows:
        assert min(row.build_seconds, row.live_step_seconds, row.replay_step_seconds) > 0
        assert row.live_epoch_seconds == pytest.approx(3 * row.live_step_seconds)
        assert row.view_bytes == 0 and row.fits
    memory = [row.peak_memory_bytes for row in found.rows]
    assert memory == sorted(memory, reverse=True) and memory[0] > memory[-1]
    parameters = sum(p.numel() * 4 for p in model.parameters())
    assert memory[-1] >= parameters
    assert found.live_epoch_seconds == pytest.approx(3 * found.live_step_seconds) and found.live_step_seconds > 0
    assert "1 batch of 8 of 24 samples" in str(found) and found.probed in str(found)
    assert [row.cut for row in plan(model, helpers.pixel_dataset(24), args=args, cuts=[3, 1], batches=1).rows] == [
        3,
        1,
    ]


def test_peak_memory_counts_weights_gradients_optimizer_and_activations(tmp_path):
    """A linear head on one vector: its input is all that is kept for the backward pass."""
    chain = make_spec(zoo.make("vit"), tmp_path).chain
    network = torch.nn.Linear(10, 3)
    steps = TrialSteps(chain, loss=lambda model, inputs: network(inputs["x"]).sum())
    steps.chain = type(
        "Chain",
        (),
        {
            "model": network,
            "prefix_parameters": lambda self, cut: {},
            "prefix_modules": lambda self, cut: [],
            "replay": lambda self, cut: preserve_rng(),
        },
    )()
    seconds, peak = steps.measure(0, [{"x": torch.randn(4, 10)}])
    weights = (10 * 3 + 3) * 4
    adam = 2 * weights + 2 * 4  # two moments, and a step number for each of the two parameters
    assert peak == 2 * weights + adam + 4 * 10 * 4
    assert seconds > 0


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, "replayed"),
        ({"views": 2, "sensitive_fraction": 1.0}, "whole"),
        ({"views": 2, "codec": "fp16"}, "replayed"),
        ({"views": 0}, "none"),
    ],
)
def test_bytes_are_those_of_the_store_that_is_then_built(settings, kind, pictures, tmp_path):
    args = helpers.make_args(tmp_path, remove_unused_columns=False, num_train_epochs=1)
    found = plan(helpers.tiny_vit(), pictures, FreezeCacheConfig(**settings), args=args, cuts=[2], batches=2)
    trainer = helpers.run(
        helpers.tiny_vit(),
        pictures,
        tmp_path,
        helpers.manual("0:2", cache="always", **settings),
        num_train_epochs=1,
        remove_unused_columns=False,
    )
    (row,) = found.rows
    assert row.bytes == trainer.freeze_status().store_bytes
    assert (row.view_bytes > 0) == (kind != "none")


@pytest.mark.parametrize("replayed", [True, False])
def test_opaque_augmentation_is_planned_as_whole_views(replayed, tmp_path):
    transform = images.replayable() if replayed else images.OpaqueFlip()
    dataset = images.picture_dataset(24).with_transform(transform)
    args = helpers.make_args(tmp_path, remove_unused_columns=False)
    (row,) = plan(helpers.tiny_vit(), dataset, args=args, cuts=[2], batches=1).rows
    whole = row.view_bytes > 0.9 * row.base_bytes
    assert whole != replayed


def test_geometry_that_is_no_homography_is_planned_as_it_would_be_kept(tmp_path):
    elastic = v2.Compose([v2.ElasticTransform(alpha=120.0, sigma=3.0), *images.TO_PIXELS])
    dataset = images.picture_dataset(16).with_transform(images.replayable(elastic))
    args = helpers.make_args(tmp_path, remove_unused_columns=False, num_train_epochs=1)
    (row,) = plan(helpers.tiny_vit(), dataset, args=args, cuts=[2], batches=2).rows
    trainer = helpers.run(
        helpers.tiny_vit(),
        dataset,
        tmp_path,
        helpers.manual("0:2", cache="always"),
        num_train_epochs=1,
        remove_unused_columns=False,
    )
    assert trainer.freeze_status().store_bytes == row.bytes


def test_text_model_is_planned_with_named_blocks(tmp_path):
    torch.manual_seed(0)
    settings = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = BertForSequenceClassification(BertConfig(**settings, num_labels=5))
    rows = [
        {"input_ids": torch.arange(1, 8) + row, "attention_mask": torch.ones(7, dtype=torch.int64), "labels": row % 5}
        for row in range(20)
    ]
    blocks = ["bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1"]
    found = plan(model, rows, FreezeCacheConfig(blocks=blocks), args=helpers.make_args(tmp_path), batches=1)
    assert [row.block for row in found.rows] == blocks
    assert len({row.bytes for row in found.rows}) == 1


def test_mixed_precision_is_that_of_the_training(tmp_path):
    args = helpers.make_args(tmp_path, bf16=True)
    config = FreezeCacheConfig(codec="fp32")
    network, dataset = helpers.tiny_resnet(), helpers.pixel_dataset(16, size=32)
    (half,) = plan(network, dataset, config, args=args, cuts=[3], batches=1).rows
    (full,) = plan(network, dataset, config, args=helpers.make_args(tmp_path), cuts=[3], batches=1).rows
    trainer = helpers.run(
        network, dataset, tmp_path, helpers.manual("0:3", cache="always", codec="fp32"), num_train_epochs=1, bf16=True
    )
    assert half.bytes == trainer.freeze_status().store_bytes
    assert half.bytes < full.bytes or trainer.model.dtype == torch.float32


def test_columns_that_no_model_takes_are_removed_as_the_trainer_does(tmp_path):
    dataset = helpers.pixel_dataset(16)
    dataset = dataset.add_column("weight", [1.5] * 16)
    args = helpers.make_args(tmp_path, num_train_epochs=1)
    (row,) = plan(helpers.tiny_vit(), dataset, args=args, cuts=[1], batches=1).rows
    trainer = helpers.run(
        helpers.tiny_vit(), dataset, tmp_path, helpers.manual("0:1", cache="always"), num_train_epochs=1
    )
    assert row.bytes == trainer.freeze_status().store_bytes


def test_budget_says_what_does_not_fit(tmp_path):
    args, dataset = helpers.make_args(tmp_path), helpers.pixel_dataset(16)
    (free,) = plan(helpers.tiny_vit(), dataset, args=args, cuts=[1], batches=1).rows
    for budget, fits in ((free.bytes, True), (free.bytes - 1, False)):
        config = FreezeCacheConfig(cache_budget=str(budget))
        (row,) = plan(helpers.tiny_vit(), dataset, config, args=args, cuts=[1], batches=1).rows
        assert row.fits == fits and row.verdict.startswith("does not fit") != fits


def test_bad_input_is_named(tmp_path):
    args = helpers.make_args(tmp_path)
    model, dataset = helpers.tiny_vit(), helpers.pixel_dataset(16)
    with pytest.raises(ValueError, match="is iterable"):
        plan(model, dataset.to_iterable_dataset(), args=args)
    for cut in (0, 5, True, 1.0):
        with pytest.raises(ValueError, match="4 blocks .*from 1 to 4"):
            plan(model, dataset, args=args, cuts=[cut])
    with pytest.raises(ValueError, match="cuts is empty"):
        plan(model, dataset, args=args, cuts=[])
    with pytest.raises(ValueError, match="batches=0"):
        plan(model, dataset, args=args, batches=0)
    with pytest.raises(ChainError, match="not declared"):
        plan(zoo.ConvNet(), [{"x": torch.zeros(3, 8, 8), "labels": 0}], args=args)


# Probing


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


def test_probe_without_suffix_is_a_handful_of_prefix_runs(pictures, tmp_path):
    build = with_views(make_spec(zoo.make("vit"), tmp_path, pictures))
    prober, loaded, ran = make_prober(build), [], []
    draw, prefix = build.source.draw, build.chain.prefix
    build.source.draw = lambda rows, *rest, **named: loaded.append(rows) or draw(rows, *rest, **named)
    build.chain.prefix = lambda *given: ran.append(given) or prefix(*given)
    costs = prober.measure(build)
    assert costs.suffix is None and costs.peak_memory_bytes is None
    assert len(set(loaded)) <= 2 and len(loaded) <= 6
    assert len(ran) <= 5
    prober.measure(build)
    assert len(loaded) <= 6


def test_hopeless_build_is_declined_without_loading_anything(pictures, tmp_path):
    build = make_spec(zoo.make("vit"), tmp_path, pictures)
    prober = make_prober(build)

    def never(*args):
        raise AssertionError("nothing may be measured")

    prober._load = prober._run_prefix = never
    for views, epochs in ((build, 1.0), (with_views(build), 2.0), (replace(build, views=ViewSpec(3)), 4.0)):
        reason, row = prober.refuse(views, epochs, room=None)
        assert "cannot save what a build costs" in reason and row is None
    reason, row = prober.refuse(build, 100, room=10)
    assert reason.startswith("it needs ") and "10 B are left" in reason and row is None


def sleeping(build, prefix):
    """The build's chain, whose prefix takes some seconds more."""
    run = build.chain.prefix
    build.chain.prefix = lambda *given: time.sleep(prefix) or run(*given)
    return build


def test_build_of_a_slow_prefix_is_accepted_and_of_a_fast_one_declined(pictures, tmp_path):
    slow = sleeping(make_spec(zoo.make("vit"), tmp_path, pictures), 0.05)
    reason, row = make_prober(slow).refuse(slow, 3.0, room=None)
    assert reason is None
    assert row.seconds_saved_per_epoch > 0.05 * 10 and row.build_seconds > 0.05 * 10

    views = with_views(slow)
    prober = make_prober(views, FreezeCacheConfig(sensitivity_batches=10))
    reason, row = prober.refuse(views, 4.1, room=None)
    assert "would save" in reason, "two runs of everything, and two more to compare"
    reason, row = prober.refuse(views, 40.0, room=None)
    assert reason is None and decide(row, 40.0) is None


def test_declined_early_measures_neither_encoding_nor_replay(pictures, tmp_path):
    build = sleeping(make_spec(zoo.make("vit"), tmp_path, pictures), 0.01)
    prober = make_prober(build)

    def never(*args):
        raise AssertionError("the prefix alone settles it")

    prober._encode = prober._time_replay = never
    reason, row = prober.refuse(build, 1.01, room=None)
    assert "would save" in reason and row is not None


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


def test_training_that_waits_for_its_loader_is_measured_with_its_steps(tmp_path):
    """Behind loader processes a prefix costs nothing, if loading takes longer: what is saved depends on the rest."""
    build = make_spec(zoo.make("vit"), tmp_path, SlowRows(), num_workers=1)
    prober = make_prober(build)
    costs = prober.measure(build)
    assert costs.suffix is not None and costs.load > costs.prefix + costs.suffix
    row = prober.row(build, costs)
    assert row.live_step_seconds == costs.load
    assert row.replay_step_seconds == max(costs.read, costs.decode + costs.suffix)
    fast = make_spec(zoo.make("vit"), tmp_path, num_workers=100)
    assert make_prober(fast).measure(fast).suffix is None


class SlowRows(Rows):
    def __getitem__(self, row):
        time.sleep(0.05)
        return super().__getitem__(row)


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
