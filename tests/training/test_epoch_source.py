"""Where an epoch's batches come from: what the value tells the loader, the model, the ledger and the checkpoint."""

import json
import shutil

import pytest
import torch
from support.asking import ask, wrap
from support.builds import Rows, collate
from support.helpers import manual, through
from support.keepers import freeze, make_context, make_keeper

from hf_freezecache.cache.store import FeatureStore
from hf_freezecache.replay.collator import ReplayCollator
from hf_freezecache.replay.requests import SourceSwitch
from hf_freezecache.training.epoch_source import FromImages, FromStore, Problem, Writing, bypassing, load_source


@pytest.fixture
def keeper(tmp_path):
    keeper = make_keeper(tmp_path, manual("1:2", codec="fp32"))
    freeze(keeper, 2)
    return keeper


def batch_of(source, rows=(1, 5, 2)):
    """A batch as the train loader makes it in an epoch of this source."""
    dataset = wrap(Rows(), seed=3)
    source.turn(dataset.switch)
    return ReplayCollator(collate)(ask(dataset, rows))


def logits(keeper, step):
    with torch.no_grad(), bypassing(keeper.provider.chain, step, force_eager=False):
        return keeper.provider.chain.model(**step.inputs).logits


def test_images_go_to_the_model_as_they_are(keeper):
    context, source = keeper.provider.spec_maker.context, FromImages(2, "it would not pay")
    batch = batch_of(source)
    step = source.step_inputs(batch, context)
    assert step.inputs is batch
    assert (step.samples, step.bypassed, step.mode, step.layout) == (3, 0, "live", None)
    assert (source.mode, source.store_bytes) == ("live", 0)


def test_stored_rows_become_features_whose_logits_are_those_of_the_images(keeper):
    context = keeper.provider.spec_maker.context
    expected = logits(keeper, FromImages(2).step_inputs(batch_of(FromImages()), context))
    source = keeper.next(2, 10, FromImages(), 1)
    step = source.step_inputs(batch_of(source), context)
    assert (step.samples, step.bypassed, step.mode) == (3, 2, "replay")
    assert step.layout == context.chain.layout(2) and step.features.shape == (3, 17, 32)
    assert step.inputs["pixel_values"].is_input and step.inputs["pixel_values"].shape == (3, 3, 16, 16)
    assert step.inputs["labels"].tolist() == [1, 0, 2]
    assert torch.equal(logits(keeper, step), expected)
    assert (source.mode, source.store_bytes) == ("replay", source.store.bytes)


def test_drawn_samples_become_features_and_are_written(tmp_path):
    keeper = make_keeper(tmp_path, through(codec="fp32"))
    freeze(keeper, 2)
    context = keeper.provider.spec_maker.context
    source = keeper.next(2, 10, FromImages(), 1)
    step = source.step_inputs(batch_of(source), context)
    assert (step.samples, step.bypassed, step.mode, source.mode) == (3, 2, "live", "live")
    expected = logits(keeper, FromImages(2).step_inputs(batch_of(FromImages()), context))
    assert torch.equal(logits(keeper, step), expected)
    assert set(step.inputs) == {"pixel_values", "labels"}
    store = keeper.next(2, 9, source, 2).store
    assert torch.equal(store.read([1, 5, 2]), step.features)


def test_batches_that_a_loader_kept_from_another_source_are_run_live(tmp_path):
    keeper = make_keeper(tmp_path, through(codec="fp32"))
    freeze(keeper, 2)
    context = keeper.provider.spec_maker.context
    images = FromImages(2, "no")
    writing = keeper.next(2, 10, FromImages(), 1)
    written = batch_of(writing)
    writing.step_inputs(written, context)
    store = keeper.next(2, 9, writing, 2)
    other = FromStore(3, FeatureStore.open(shutil.copytree(store.store.path, tmp_path / "other")))
    expected = logits(keeper, images.step_inputs(batch_of(images), context))
    for source, batch in ((images, batch_of(store)), (other, batch_of(store)), (images, written), (store, written)):
        step = source.step_inputs(batch, context)
        assert (step.bypassed, step.mode, set(step.inputs)) == (0, "live", {"pixel_values", "labels"})
        assert torch.equal(logits(keeper, step), expected)


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), ValueError("sample 1 is not finite"), RuntimeError("out of memory")],
)
def test_what_cannot_be_written_costs_the_step_nothing(error, tmp_path, monkeypatch):
    keeper = make_keeper(tmp_path, through())
    freeze(keeper, 2)
    source = keeper.next(2, 10, FromImages(), 1)

    def fail(*args):
        raise error

    monkeypatch.setattr(source.store, "write", fail)
    step = source.step_inputs(batch_of(source), keeper.provider.spec_maker.context)
    assert logits(keeper, step).isfinite().all()
    assert source.problem == Problem(False, f"{error} ({type(error).__name__})", 1)


def test_bug_while_writing_is_raised(tmp_path, monkeypatch):
    keeper = make_keeper(tmp_path, through())
    freeze(keeper, 2)
    source = keeper.next(2, 10, FromImages(), 1)
    monkeypatch.setattr(source.store, "write", lambda *args: None + 1)
    with pytest.raises(TypeError):
        source.step_inputs(batch_of(source), keeper.provider.spec_maker.context)


def test_images_that_a_user_collates_are_taken_in_every_epoch(keeper):
    context = keeper.provider.spec_maker.context
    batch = collate([Rows()[0], Rows()[1]])
    for source in (keeper.next(2, 10, FromImages(), 1), Writing(2, None, 1, 1)):
        step = source.step_inputs(batch, context)
        assert step.inputs is batch and (step.samples, step.bypassed, step.mode) == (2, 0, "live")


@pytest.mark.parametrize(
    "source",
    [
        FromImages(),
        FromImages(3, "it would not pay"),
        FromImages(3, "the disk is gone", lost_in=4),
        FromStore(3, None),
        Writing(3, None, 4, 5, name="f" * 32),
        Writing(3, None, 4, 5, Problem(True, "a view is not projective", 5), name="f" * 32),
    ],
)
def test_state_comes_back_from_json(source):
    again = load_source(json.loads(json.dumps(source.state_dict())))
    assert type(again) is type(source)
    assert again.state_dict() == source.state_dict() and vars(again) == vars(source)


def test_store_that_nobody_has_opened_says_so(tmp_path):
    context = make_context(tmp_path)
    for source in (FromStore(2, None), Writing(2, None, 1, 1)):
        with pytest.raises(RuntimeError, match="cut 2 was not opened since the training was resumed"):
            source.turn(SourceSwitch(1))
    assert not FromStore(2, None).is_open and context.chain.cut == 0
