"""Rows of a store against what the samples and the model give now: equal rows pass, every other row is named."""

from dataclasses import replace

import pytest
import torch
from support.builds import Rows, collate, make_spec
from support.helpers import tiny_vit
from support.images import OpaqueFlip, picture_dataset, replayable

from hf_freezecache.build.comparison import compare_rows
from hf_freezecache.build.deepening import deepened
from hf_freezecache.build.materialize import materialize, run_views
from hf_freezecache.build.survey import choose_channels, make_view_spec, survey
from hf_freezecache.distributed import Group


class OneRowChanged(Rows):
    """Rows of which one has another image."""

    def __getitem__(self, row):
        sample = super().__getitem__(row)
        return {**sample, "pixel_values": sample["pixel_values"] * (1.5 if row == 9 else 1)}


def spec_with_views(model, folder, dataset, codec, fraction=0.25):
    spec = make_spec(model, folder, dataset, codec=codec)
    found = survey(spec.source, "pixel_values")
    views = make_view_spec(found, spec.layout, 1, round(fraction * spec.layout.channels))
    return choose_channels(replace(spec, views=views), "ssim", 4, True)


def first_difference(store, spec, change=lambda view_run: view_run):
    for number, view_runs in run_views(spec, range(spec.source.num_ranges)):
        for view, view_run in enumerate(view_runs):
            found = compare_rows(store, spec.source.rows(number), view, change(view_run))
            if found is not None:
                return found
    return None


KINDS = {
    "none": Rows,
    "warped views": lambda: picture_dataset().with_transform(replayable()),
    "whole draws": lambda: picture_dataset().with_transform(OpaqueFlip()),
}


@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8", "int4", "int2"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_rows_that_a_build_would_write_again_do_not_differ(kind, codec, tmp_path):
    spec = spec_with_views(tiny_vit().eval(), tmp_path, KINDS[kind](), codec)
    store = materialize(spec, Group())
    assert first_difference(store, spec) is None

    def rounded(view_run):
        noise = torch.randn(view_run.features.shape, generator=torch.Generator().manual_seed(0))
        return replace(view_run, features=view_run.features * (1 + 1e-6 * noise))

    assert first_difference(store, spec, rounded) is None


@pytest.mark.parametrize("codec", ["fp32", "int8", "int4", "int2"])
def test_another_image_is_named(codec, tmp_path):
    model = tiny_vit().eval()
    store = materialize(make_spec(model, tmp_path, codec=codec), Group())
    found = first_difference(store, make_spec(model, tmp_path, OneRowChanged(), codec=codec))
    assert (found.sample, found.view, found.entry) == (9, 0, "features")
    assert "sample 9 differs in features" in str(found) and "file" in found.likely_cause


def test_another_label_is_named_with_both_values(tmp_path):
    model = tiny_vit().eval()
    store = materialize(make_spec(model, tmp_path), Group())
    relabelled = Rows(label=lambda row: 4 if row == 5 else row % 5)
    found = first_difference(store, make_spec(model, tmp_path, relabelled))
    assert (found.sample, found.entry, found.detail) == (5, "labels", "4 now, 0 in the store")


def test_missing_labels_are_no_difference(tmp_path):
    model, rows = tiny_vit().eval(), Rows(label=lambda row: float("nan") if row == 3 else 1.0)
    spec = make_spec(model, tmp_path, rows)
    assert first_difference(materialize(spec, Group()), spec) is None


@pytest.mark.parametrize("entry", ["extra", None])
def test_other_model_inputs_are_named(entry, tmp_path):
    def more(samples):
        batch = collate(samples)
        return {**batch, "extra": batch["labels"] + 1} if entry else {"pixel_values": batch["pixel_values"]}

    model = tiny_vit().eval()
    store = materialize(make_spec(model, tmp_path), Group())
    found = first_difference(store, make_spec(model, tmp_path, collator=more))
    assert found.entry == (entry or "labels")


def test_weights_of_the_prefix_changed_in_place_are_seen(tmp_path):
    model = tiny_vit().eval()
    spec = make_spec(model, tmp_path, codec="int4")
    store = materialize(spec, Group())
    with torch.no_grad():
        next(model.vit.layers[0].parameters()).mul_(1.5)
        model.vit.embeddings.patch_embeddings.projection.weight.mul_(1.2)
    assert first_difference(store, spec).entry == "features"


def test_views_of_one_batch_are_compared_each_with_its_own(tmp_path):
    spec = spec_with_views(tiny_vit().eval(), tmp_path, KINDS["warped views"](), "int8")
    store = materialize(spec, Group())
    _, (base, view) = next(iter(run_views(spec, [0])))
    rows, views = list(spec.source.rows(0)), torch.tensor([0, 1, 1, 0]).numpy()
    chosen = torch.from_numpy(views)[:, None, None].bool()
    mixed = replace(view, features=torch.where(chosen, view.features, base.features))
    assert compare_rows(store, rows, views, mixed) is None
    assert compare_rows(store, rows, 1 - views, mixed) is not None


def test_deepened_store_may_lose_what_its_parent_lost_but_not_the_sample(tmp_path):
    model = tiny_vit().eval()
    before, spec = (make_spec(model, tmp_path, cut=cut, codec="int8") for cut in (1, 3))
    chained = materialize(deepened(spec, materialize(before, Group()), lambda batch: batch), Group())
    assert first_difference(chained, spec) is None
    other = make_spec(model, tmp_path, OneRowChanged(), cut=3, codec="int8")
    shuffled = lambda view_run: replace(view_run, features=view_run.features.flip(0))  # noqa: E731
    assert first_difference(chained, other, shuffled).entry == "features"
