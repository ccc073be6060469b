"""Stores made from the one before: as those from images where nothing is lost, near them elsewhere."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.builds import Rows, collate, make_spec, on_every_process
from support.helpers import tiny_resnet, tiny_vit
from support.images import TO_PIXELS, picture_dataset, replayable
from support.packed_stores import pack
from torchvision.transforms import v2

from hf_freezecache.augment.geometry import DENSE
from hf_freezecache.build.deepening import DEEPENED_FROM, StoreFeatures, deepened, why_not_deepen
from hf_freezecache.build.materialize import materialize, open_matching
from hf_freezecache.build.survey import choose_channels, make_view_spec, survey
from hf_freezecache.cache.view_columns import ViewSpec
from hf_freezecache.distributed import Group
from hf_freezecache.replay.decode import replay_features


def settled_resnet():
    """With BatchNorm statistics that are not those of a fresh model."""
    model = tiny_resnet().train()
    with torch.no_grad():
        for _ in range(5):
            model(pixel_values=torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) + 1)
    return model.eval()


MODELS = {"vit": (tiny_vit, 16), "resnet": (settled_resnet, 32)}
both = pytest.mark.parametrize("name", list(MODELS))


@pytest.fixture(params=list(MODELS))
def pair(request):
    """A model and augmented pictures of its size."""
    build, size = MODELS[request.param]
    return build().eval(), picture_dataset(22, size).with_transform(replayable(size=size))


def plan_views(spec, views=2, fraction=0.25):
    """The spec with views, as the trainer makes it."""
    found = survey(spec.source, "pixel_values")
    count = round(fraction * spec.layout.channels)
    return replace(spec, views=make_view_spec(found, spec.layout, views, count))


def settle(spec):
    return choose_channels(spec, "ssim", 4, True)


def from_store(spec, store, count_run=None):
    """The spec with the store's features in place of images."""
    assert why_not_deepen(store, spec) is None
    return deepened(spec, store, lambda batch: batch, count_run=count_run)


def counted():
    """Samples run between two cuts, and the function that counts them."""
    runs = Counter()
    return runs, lambda from_cut, to_cut, samples: runs.update({(from_cut, to_cut): samples})


def build_both(model, dataset, folder: Path, codec, cut=1, to_cut=3, **views):
    """A store from images and one from the store before, at the same cut."""
    before, spec = (make_spec(model, folder, dataset, cut=at, codec=codec) for at in (cut, to_cut))
    if views:
        before, spec = plan_views(before, **views), plan_views(spec, **views)
    old = materialize(settle(before), Group())
    chained = materialize(settle(from_store(spec, old)), Group())
    return materialize(settle(spec), Group()), chained


def shard_sums(store):
    return [(shard.name, shard.rows, shard.sha256) for shard in store.manifest.shards]


def view_features(store, view):
    codes = store.read_rows(range(len(store)), np.full(len(store), view) if view else None)
    return replay_features(store, {name: codes[name] for name in store.code_names(codes)})


def relative_error(features, true):
    return ((features - true).square().mean() / true.var()).sqrt().item()


# What comes out


@pytest.mark.parametrize("views", [{}, dict(views=1, fraction=1.0), dict(views=2, fraction=1.0)])
def test_deepening_a_lossless_store_gives_the_bytes_of_a_build_from_images(pair, views, tmp_path):
    raw, chained = build_both(*pair, tmp_path, "fp32", **views)
    assert shard_sums(chained) == shard_sums(raw) and chained.verify()
    assert chained.manifest.views == views.get("views", 0) and chained.manifest.inputs == raw.manifest.inputs
    # Made from coarser features it would be another store: they never share a name.
    assert chained.path != raw.path


@pytest.mark.parametrize(("codec", "most"), [("int8", 0.02), ("int4", 0.35)])
def test_deepening_a_quantized_store_adds_its_error(pair, codec, most, tmp_path):
    raw, chained = build_both(*pair, tmp_path, codec)
    true, _ = build_both(*pair, tmp_path, "fp32")
    true = true.read(range(22))
    errors = [relative_error(store.read(range(22)), true) for store in (raw, chained)]
    assert errors[0] < errors[1] < most
    rows = [store.read_rows(range(22))["labels"].tolist() for store in (raw, chained)]
    assert rows[0] == rows[1]


def test_deepening_in_two_steps_is_possible(tmp_path):
    model = tiny_vit().eval()
    first, second, third = (make_spec(model, tmp_path, cut=cut, codec="fp32") for cut in (1, 2, 4))
    store = materialize(first, Group())
    for spec in (second, third):
        store = materialize(from_store(spec, store), Group())
    assert shard_sums(store) == shard_sums(materialize(third, Group()))
    assert store.manifest.made_from[DEEPENED_FROM] != store.manifest.fingerprint


def test_deepening_keeps_views_by_their_sensitive_channels(pair, tmp_path):
    raw, chained = build_both(*pair, tmp_path, "fp32", views=2, fraction=0.75)
    spec = make_spec(pair[0], tmp_path, pair[1], cut=3)
    source, chain = spec.source, spec.chain
    assert chained.manifest.geometry == raw.manifest.geometry == "projective"
    assert len(chained.manifest.sensitive_channels) == len(raw.manifest.sensitive_channels)
    assert chained.bytes == raw.bytes
    assert torch.equal(chained.read(range(22)), raw.read(range(22)))
    for view in (1, 2):
        one, other = (store.read_rows(range(22), np.full(22, view)) for store in (raw, chained))
        assert torch.equal(one["geometry"], other["geometry"]) and torch.equal(one["labels"], other["labels"])
        pixels = source.collate(range(22), view)["pixel_values"]
        true = chain.prefix({"pixel_values": pixels}, 3)
        base, near, nearest = (
            relative_error(features, true)
            for features in (view_features(raw, 0), view_features(chained, view), view_features(raw, view))
        )
        assert near < min(0.8 * base, 1.5 * nearest), (base, near, nearest)


def test_deepening_from_sensitive_channels_to_whole_views_replays_them(pair, tmp_path):
    model, dataset = pair
    old = materialize(settle(plan_views(make_spec(model, tmp_path, dataset, cut=1, codec="fp32"))), Group())
    spec = plan_views(make_spec(model, tmp_path, dataset, cut=3, codec="fp32"), fraction=1.0)
    store = materialize(settle(from_store(spec, old)), Group())
    assert store.views.spec.whole and store.manifest.views == 2
    expected = spec.chain.advance({"pixel_values": view_features(old, 2)}, 1, 3)
    torch.testing.assert_close(view_features(store, 2), expected)


def test_dense_geometry_is_taken_over_without_being_asked_for_again(tmp_path):
    pipeline = v2.Compose([*TO_PIXELS, v2.RandomErasing(p=1.0)])
    dataset = picture_dataset(22).with_transform(replayable(pipeline))
    model = tiny_vit().eval()
    old = plan_views(make_spec(model, tmp_path, dataset, cut=1, codec="int8"))
    old = materialize(settle(replace(old, views=replace(old.views, geometry=DENSE))), Group())
    spec = plan_views(make_spec(model, tmp_path, dataset, cut=3, codec="int8"))
    store = materialize(settle(from_store(spec, old)), Group())
    assert spec.views.geometry == "projective" and store.manifest.geometry == DENSE
    one, other = (each.read_rows(range(22), np.full(22, 1))["geometry"] for each in (old, store))
    assert torch.equal(one, other)


def test_inputs_of_every_kind_come_from_the_store(tmp_path):
    def described(samples):
        batch = collate(samples)
        return {**batch, "name": [f"class {label}" for label in batch["labels"]], "scale": 2.0}

    model = tiny_vit().eval()
    old, spec = (make_spec(model, tmp_path, cut=cut, codec="fp32", collator=described) for cut in (2, 3))
    old = materialize(old, Group())
    seen = []

    def model_inputs(batch):
        seen.append(batch)
        return {"pixel_values": batch["pixel_values"]}

    assert why_not_deepen(old, spec) is None
    spec = deepened(spec, old, model_inputs)
    store = materialize(spec, Group())
    expected = spec.source.collate(range(22))
    read = store.read_rows(range(22))
    assert torch.equal(read["labels"], expected["labels"]) and read["name"] == expected["name"]
    assert read["scale"] == 2.0
    assert all(batch.keys() == {"pixel_values", "labels", "name", "scale"} for batch in seen)


def test_labels_of_views_go_with_their_view(tmp_path):
    def drawing_labels(samples):
        batch = collate(samples)
        return {**batch, "weight": torch.rand(len(samples))}

    model, dataset = tiny_vit().eval(), picture_dataset(22).with_transform(replayable())
    old, spec = (
        replace(
            make_spec(model, tmp_path, dataset, cut=cut, codec="fp32", collator=drawing_labels),
            views=ViewSpec(2, own_inputs=True),
        )
        for cut in (1, 3)
    )
    chained = materialize(from_store(spec, materialize(old, Group())), Group())
    assert shard_sums(chained) == shard_sums(materialize(spec, Group()))
    weights = [chained.read_rows(range(22), np.full(22, view))["weight"] for view in (0, 1, 2)]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_deepening_from_a_packed_store_gives_the_bytes_of_one_from_images(tmp_path):
    model = tiny_vit().eval()
    before, after = (make_spec(model, tmp_path, cut=cut, codec="fp32") for cut in (1, 3))
    old = materialize(pack(before), Group())
    for target in (after, pack(after)):
        images = materialize(target, Group())
        assert why_not_deepen(old, target) is None
        chained = materialize(deepened(target, old, lambda batch: batch), Group())
        assert [shard.sha256 for shard in chained.manifest.shards] == [
            shard.sha256 for shard in images.manifest.shards
        ]


# How


def test_only_the_blocks_in_between_run(tmp_path):
    model = tiny_vit().eval()
    old, spec = (make_spec(model, tmp_path, cut=cut) for cut in (2, 3))
    samples_run, count_run = counted()
    spec = from_store(spec, materialize(old, Group()), count_run)
    for cut in (2, 3):  # before what runs is counted
        spec.chain.prove(spec.chain._trace.probe, cut)
    ran = [0] * 4

    def count(index):
        def hook(module, args, output):
            ran[index] += len(output)

        return hook

    handles = [block.modules[-1].register_forward_hook(count(index)) for index, block in enumerate(spec.chain.blocks)]
    before = list(ran)
    materialize(spec, Group())
    for handle in handles:
        handle.remove()
    # Block 3 is begun, and left before it computes; what is bypassed returns placeholders.
    assert [now - then for now, then in zip(ran, before, strict=True)][2:] == [22, 0]
    assert samples_run == {(2, 3): 22}


@both
def test_two_processes_write_the_rows_of_one(name, tmp_path):
    build, size = MODELS[name]
    model, dataset = build().eval(), picture_dataset(22, size).with_transform(replayable(size=size))
    old = materialize(settle(plan_views(make_spec(model, tmp_path / "old", dataset, cut=1))), Group())

    def work(group, folder):
        spec = from_store(plan_views(make_spec(model, folder, dataset, cut=3)), old)
        settled = group.on_main(lambda: settle(spec).views)
        return materialize(replace(spec, views=settled), group)

    one = work(Group(), tmp_path / "one")
    together = on_every_process(2, lambda group: work(group, tmp_path / "two"))
    assert not [each for each in together if isinstance(each, Exception)]
    assert len(together[0].manifest.shards) == 2 and together[0].path.name == one.path.name
    for view in (0, 1, 2):
        rows, same = (store.read_rows(range(22), np.full(22, view)) for store in (one, together[1]))
        assert rows.keys() == same.keys() and all(torch.equal(rows[key], same[key]) for key in rows)


def test_deepening_leaves_generators_alone(pair, tmp_path):
    model, dataset = pair
    old = materialize(settle(plan_views(make_spec(model, tmp_path, dataset, cut=1))), Group())
    spec = plan_views(make_spec(model.train(), tmp_path, dataset, cut=3))
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    spec = from_store(spec, old)
    for _ in spec.feature_source.run(range(spec.source.num_ranges), views=2, geometry="projective"):
        pass
    materialize(settle(spec), Group())
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert [module.training for module in model.modules()] == modes


def test_finished_deepening_is_found_again(tmp_path):
    model = tiny_vit().eval()
    old = materialize(make_spec(model, tmp_path, cut=1), Group())
    spec = make_spec(model, tmp_path, cut=3)
    store = materialize(from_store(spec, old), Group())
    assert open_matching(spec, Group()) is None
    assert open_matching(from_store(spec, old), Group()).path == store.path


def test_geometry_alone_needs_no_run_on_the_views(tmp_path):
    model, dataset = settled_resnet(), picture_dataset(22, 32).with_transform(replayable(size=32))
    old, spec = (plan_views(make_spec(model, tmp_path, dataset, cut=cut), fraction=0.0) for cut in (1, 2))
    samples_run, count_run = counted()
    spec = from_store(spec, materialize(settle(old), Group()), count_run)
    runs = [views for _, views in spec.feature_source.run(range(6), 2, "projective", own_features=False)]
    assert samples_run == {(1, 2): 22}
    assert all(len(views) == 3 and views[1].features is None and views[2].geometry.shape[1] == 8 for views in runs)


# When it cannot be done


def test_store_that_can_be_deepened_has_no_reason_against_it(pair, tmp_path):
    model, dataset = pair
    old = materialize(settle(plan_views(make_spec(model, tmp_path, dataset, cut=1))), Group())
    for views, fraction in ((0, 0.25), (1, 0.25), (2, 0.5), (2, 1.0)):
        spec = plan_views(make_spec(model, tmp_path, dataset, cut=3), views, fraction)
        assert why_not_deepen(old, spec) is None


def _other_weights(model):
    with torch.no_grad():
        next(model.vit.embeddings.parameters()).add_(1)


def _other_attention(model):
    model.config._attn_implementation = "eager"


@pytest.mark.parametrize(
    ("change", "settings", "reason"),
    [
        (None, dict(cut=2), "not before cut 2"),
        (None, dict(cut=1), "not before cut 1"),
        (None, dict(dataset=Rows(21)), "data set"),
        (None, dict(collator=lambda samples: collate(samples)), "collator"),
        (None, dict(seed=4), "seed"),
        (None, dict(batch_size=5), "batch size"),
        (_other_weights, {}, "other weights"),
        (_other_attention, {}, "configuration"),
    ],
)
def test_other_origin_is_a_reason_not_to_deepen(change, settings, reason, tmp_path):
    model = tiny_vit().eval()
    old = materialize(make_spec(model, tmp_path, cut=2), Group())
    if change is not None:
        change(model)
    spec = make_spec(model, tmp_path, **{"cut": 3, **settings})
    assert reason in why_not_deepen(old, spec)


def test_other_precision_is_a_reason_not_to_deepen(tmp_path):
    model = tiny_vit().eval()
    old = materialize(make_spec(model, tmp_path, cut=2), Group())
    spec = make_spec(model, tmp_path, cut=3)
    assert "mixed precision" in why_not_deepen(old, replace(spec, made_from={**spec.made_from, "precision": "bf16"}))


def test_other_layout_is_a_reason_not_to_deepen(tmp_path):
    model = settled_resnet()
    old = materialize(make_spec(model, tmp_path, Rows(size=32), cut=2), Group())
    spec = make_spec(model, tmp_path, Rows(size=32), cut=3)
    spec.chain.trace({"pixel_values": torch.randn(2, 3, 48, 48)})
    assert "another layout" in why_not_deepen(old, spec)


def test_other_model_inputs_are_a_reason_not_to_deepen(tmp_path):
    class Switched:
        """Returns more than its digest tells."""

        extra = False

        def __call__(self, samples):
            return {**collate(samples), **({"more": torch.zeros(len(samples))} if Switched.extra else {})}

        def __reduce__(self):
            return str, ("a collator",)

    model = tiny_vit().eval()
    old = materialize(make_spec(model, tmp_path, cut=2, collator=Switched()), Group())
    spec = make_spec(model, tmp_path, cut=3, collator=Switched())
    Switched.extra = True
    assert "other model inputs" in why_not_deepen(old, spec)


def test_views_that_are_missing_are_a_reason_not_to_deepen(tmp_path):
    dataset, model = picture_dataset(22, 32).with_transform(replayable(size=32)), settled_resnet()

    def planned(cut, geometry=None, views=1, fraction=0.25):
        spec = plan_views(make_spec(model, tmp_path, dataset, cut=cut), views, fraction)
        return spec if geometry is None else replace(spec, views=replace(spec.views, geometry=geometry))

    projective = materialize(settle(planned(1)), Group())
    assert "holds 1 augmented views of a sample and 2 are wanted" in why_not_deepen(projective, planned(2, views=2))
    assert "dense geometry is wanted" in why_not_deepen(projective, planned(2, DENSE))
    own = replace(planned(2), views=ViewSpec(1, own_inputs=True))
    assert "of the views' own" in why_not_deepen(projective, own)
    dense = materialize(replace(settle(planned(1, DENSE)), made_from={**planned(1).made_from, "kind": DENSE}), Group())
    assert why_not_deepen(dense, planned(3)) is None
    assert "grid of (8, 8), and cut 4 has (4, 4)" in why_not_deepen(dense, planned(4))
    assert why_not_deepen(projective, planned(4)) is None
    whole = planned(1, fraction=1.0)
    whole = materialize(replace(whole, made_from={**whole.made_from, "kind": "whole"}), Group())
    assert "holds whole views" in why_not_deepen(whole, planned(2))


def test_runs_refuse_views_that_the_store_does_not_hold(tmp_path):
    model = tiny_vit().eval()
    store = materialize(make_spec(model, tmp_path, cut=2), Group())
    spec = make_spec(model, tmp_path, cut=3)
    features = StoreFeatures(spec.chain, 3, spec.source, spec.layout, store, lambda batch: batch)
    for wanted in (dict(views=1), dict(geometry="projective")):
        with pytest.raises(ValueError, match="from samples"):
            next(features.run([0], **wanted))
