"""Where the next epoch's batches come from: the transition as a table, and the keeper without a training."""

import json
import shutil

import pyarrow as pa
import pytest
import torch
from support.builds import Rows
from support.helpers import manual, messages, through, tiny_vit
from support.keepers import freeze, make_keeper

from hf_freezecache.build.errors import BuildFailed, GeometryMisfit, OverLimit
from hf_freezecache.build.partial import PartialStore
from hf_freezecache.cache.store import FeatureStore
from hf_freezecache.distributed import Announcer
from hf_freezecache.training import store_provider
from hf_freezecache.training.epoch_source import FromImages, FromStore, Problem, Writing, load_source
from hf_freezecache.training.store_keeper import Step, choose_step
from hf_freezecache.training.store_provider import Decision, StoreProvider

# The transition


class Opened:
    """Stands for an open store with one augmented view: two epochs write it."""

    class views:
        class spec:
            count = 1

    class path:
        name = "f" * 32


def writing(cut=2, start=3, store=None):
    return Writing(cut, Opened if store is None else store, start, start)


UNOPENED = Writing(2, None, 3, 3, name="f" * 32)
PROBLEM = Problem(False, "the disk is full", 3)
BUILT, WRITTEN = Decision("int4", "a" * 32), Decision("int4", "a" * 32, written=True)


@pytest.mark.parametrize(
    ("previous", "cut", "epoch", "decision", "problems", "through", "step"),
    [
        # Nothing is frozen
        (FromImages(), 0, 0, None, [], False, Step.IMAGES),
        (FromImages(), 0, 0, None, [], True, Step.IMAGES),
        # The first epoch of a cut
        (FromImages(), 2, 1, None, [], False, Step.BUILD),
        (FromImages(), 2, 1, None, [], True, Step.BEGIN),
        (FromStore(1, Opened), 2, 1, None, [], False, Step.BUILD),
        (FromStore(1, Opened), 2, 1, None, [], True, Step.BEGIN),
        (FromImages(1, "it would not pay"), 2, 1, None, [], False, Step.BUILD),
        # The cut stays
        (FromStore(2, Opened), 2, 5, BUILT, [], False, Step.STAY),
        (FromStore(2, Opened), 2, 5, WRITTEN, [], True, Step.STAY),
        (FromImages(2, "it would not pay"), 2, 5, None, [], False, Step.STAY),
        (FromImages(2, "it would not pay"), 2, 5, None, [], True, Step.STAY),
        # the rest of the epoch in which a store was lost, in a resumed training too; then there is another one
        (FromImages(2, "the disk is gone", lost_in=5), 2, 5, Decision("int4", "a"), [], False, Step.STAY),
        (FromImages(2, "the disk is gone", lost_in=5), 2, 6, Decision("int4", "a"), [], False, Step.BUILD),
        # Epochs write
        (writing(start=3), 2, 3, Decision("int4", written=True), [], True, Step.WRITE),
        (writing(start=3), 2, 4, Decision("int4", written=True), [], True, Step.WRITE),
        (writing(start=3), 2, 5, Decision("int4", written=True), [], True, Step.FINISH),
        (writing(start=3), 2, 4, Decision("int4", written=True), [PROBLEM], True, Step.GIVE_UP),
        (UNOPENED, 2, 4, Decision("int4", written=True), [], True, Step.OPEN),
        (UNOPENED, 2, 4, Decision("int4", written=True), [PROBLEM], True, Step.GIVE_UP),
        # A misfit has given the writing up: a build makes the store
        (FromImages(), 2, 4, Decision("int4"), [], True, Step.BUILD),
        # Resumed in a replay epoch
        (FromStore(2, None), 2, 6, BUILT, [], False, Step.BUILD),
        (FromStore(2, None), 2, 6, BUILT, [], True, Step.BUILD),
        (FromStore(2, None), 2, 6, WRITTEN, [], True, Step.RESTORE),
        (FromStore(1, None), 2, 6, None, [], False, Step.BUILD),
        # Resumed from before the freeze, where the stores were decided for by the killed run only
        (FromImages(), 2, 1, None, [], False, Step.BUILD),
    ],
)
def test_step_follows_from_the_last_source(previous, cut, epoch, decision, problems, through, step):
    assert choose_step(previous, cut, epoch, decision, problems, through) is step


# The keeper


def next_source(keeper, cut, previous=None, epoch=1, epochs_left=10):
    freeze(keeper, cut)
    return keeper.next(cut, epochs_left, FromImages() if previous is None else previous, epoch)


def resumed(keeper, source, tmp_path, **settings):
    """Keeper and source as a checkpoint of them gives them back."""
    state = json.loads(json.dumps({"source": source.state_dict(), "stores": keeper.state_dict()}))
    again = make_keeper(tmp_path, keeper.provider.config, **settings)
    again.load_state_dict(state["stores"], source.cut)
    return again, load_source(state["source"])


def test_store_is_built_and_stays_for_its_cut(tmp_path):
    keeper = make_keeper(tmp_path)
    source = next_source(keeper, 2)
    assert isinstance(source, FromStore) and source.cut == 2 and len(source.store) == 22
    assert keeper.next(2, 9, source, 2) is source
    [phase] = keeper.accounts.ledger.phases
    assert (phase.cut, phase.mode, phase.epochs, phase.store_bytes) == (2, "build", 1, source.store.bytes)
    assert phase.flops == keeper.accounts.meter.per_sample("build", 2) * 22


def test_store_of_another_run_is_reused_and_not_deleted(tmp_path):
    other = next_source(make_keeper(tmp_path), 2).store
    keeper = make_keeper(tmp_path)
    source = next_source(keeper, 2)
    assert source.store.path == other.path and keeper.accounts.ledger.phases[0].epochs == 0
    deeper = next_source(keeper, 3, source, epoch=2)
    assert deeper.cut == 3 and FeatureStore.open(other.path).verify()


def test_own_store_of_an_earlier_cut_is_deleted_when_the_deeper_one_is_complete(tmp_path):
    keeper = make_keeper(tmp_path)
    source = next_source(keeper, 2)
    deeper = next_source(keeper, 3, source, epoch=2)
    assert not source.store.path.exists() and deeper.store.path.exists()
    assert keeper.provider.holdings.outdated(4) == [deeper.store.path]


def test_what_can_not_be_cached_is_from_images_with_the_reason(tmp_path):
    source = next_source(make_keeper(tmp_path, why_not="cache='never'"), 2)
    assert isinstance(source, FromImages) and (source.cut, source.why) == (2, "cache='never'")
    assert not list(tmp_path.iterdir())


def test_budget_that_holds_nothing_declines_once(tmp_path, caplog):
    keeper = make_keeper(tmp_path, manual("1:2", cache_budget="100"))
    source = next_source(keeper, 2)
    assert isinstance(source, FromImages) and "only 100 B of `cache_budget` are left" in source.why
    assert keeper.next(2, 9, source, 2) is source
    assert messages(caplog).count("No feature store for cut 2") == 1


def test_lost_store_is_built_again_after_a_resume(tmp_path):
    keeper = make_keeper(tmp_path)
    source = next_source(keeper, 2)
    shutil.rmtree(source.store.path)
    again, previous = resumed(keeper, source, tmp_path)
    restored = next_source(again, 2, previous, epoch=2)
    assert restored.store.path == source.store.path and restored.store.verify()


def test_decision_for_images_is_not_taken_again_after_a_resume(tmp_path):
    keeper = make_keeper(tmp_path, manual("1:2", cache_budget="100"))
    again, previous = resumed(keeper, next_source(keeper, 2), tmp_path)
    source = next_source(again, 2, previous, epoch=2)
    assert isinstance(source, FromImages) and "cache_budget" in source.why


def test_deeper_store_comes_from_the_one_before_which_is_built_again_if_it_is_lost(tmp_path):
    config = manual("1:2", deepen="cache", codec="fp32")
    keeper = make_keeper(tmp_path / "whole", config)
    source = next_source(keeper, 2)
    expected = next_source(keeper, 3, source, epoch=2).store
    assert expected.manifest.made_from["deepened_from"] == source.store.manifest.fingerprint

    keeper = make_keeper(tmp_path / "lost", config)
    source = next_source(keeper, 2)
    shutil.rmtree(source.store.path)
    again, previous = resumed(keeper, source, tmp_path / "lost")
    store = next_source(again, 3, previous, epoch=2).store
    assert store.path.name == expected.path.name
    assert again.provider.decisions[3] == Decision("fp32", store.path.name, parent=2)


def write_epoch(keeper, source):
    """Runs an epoch whose samples are all drawn."""
    for number in range(keeper.provider.source.num_ranges):
        rows = list(keeper.provider.source.rows(number))
        batch = dict(keeper.provider.source.collate(rows))
        batch |= {
            "freezecache-drawn.views": torch.zeros(len(rows)).long(),
            "freezecache-row.table": torch.tensor([[row, 0, 0, 0] for row in rows]),
        }
        step = source.step_inputs(batch, keeper.provider.spec_maker.context)
        assert (step.bypassed, step.mode, step.samples) == (2, "live", len(rows))


def test_store_that_an_epoch_has_written_is_that_of_a_build(tmp_path):
    built = next_source(make_keeper(tmp_path / "built"), 2).store
    keeper = make_keeper(tmp_path / "written", through())
    source = next_source(keeper, 2)
    assert isinstance(source, Writing) and isinstance(source.store, PartialStore) and source.round == 0
    assert source.store_bytes == source.store.bytes > 0
    write_epoch(keeper, source)
    finished = keeper.next(2, 9, source, 2)
    assert isinstance(finished, FromStore)
    assert torch.equal(finished.store.read(range(22)), built.read(range(22)))
    assert keeper.provider.decisions[2] == Decision("int4", finished.store.path.name, written=True)
    assert [path.name for path in (tmp_path / "written").iterdir()] == [finished.store.path.name]


def test_writing_goes_on_after_a_resume_and_what_is_missing_is_computed(tmp_path):
    keeper = make_keeper(tmp_path, through())
    source = next_source(keeper, 2)
    source.close()
    again, previous = resumed(keeper, source, tmp_path)
    reopened = next_source(again, 2, previous)
    assert isinstance(reopened, Writing) and reopened.round == 0 and reopened.name == source.name
    finished = again.next(2, 9, reopened, 2)
    assert isinstance(finished, FromStore) and len(finished.store) == 22


def test_written_store_that_is_lost_is_computed_again_after_a_resume(tmp_path):
    keeper = make_keeper(tmp_path, through())
    source = next_source(keeper, 2)
    write_epoch(keeper, source)
    finished = keeper.next(2, 9, source, 2)
    shutil.rmtree(finished.store.path)
    again, previous = resumed(keeper, finished, tmp_path)
    restored = next_source(again, 2, previous, epoch=3)
    assert isinstance(restored, FromStore) and restored.store.path == finished.store.path


def test_epochs_that_have_written_a_store_are_repeated_by_a_training_resumed_from_before(tmp_path):
    keeper = make_keeper(tmp_path, through())
    start = json.loads(json.dumps(keeper.state_dict()))
    source = next_source(keeper, 2)
    write_epoch(keeper, source)
    finished = keeper.next(2, 9, source, 2)
    again = make_keeper(tmp_path, through())
    again.load_state_dict(start, 0)
    repeated = next_source(again, 2)
    assert isinstance(repeated, Writing) and isinstance(repeated.store, FeatureStore) and repeated.store_bytes == 0
    assert again.next(2, 9, repeated, 2).store.path == finished.store.path
    # Another training takes the complete store at once.
    assert isinstance(next_source(make_keeper(tmp_path, through()), 2), FromStore)


def test_writing_that_the_next_cut_overtakes_is_given_up(tmp_path):
    keeper = make_keeper(tmp_path, through())
    source = next_source(keeper, 2)
    deeper = next_source(keeper, 3, source, epoch=2)
    assert isinstance(deeper, Writing) and (deeper.cut, deeper.start) == (3, 2)
    assert not source.store.path.exists() and deeper.store.path.exists()


def test_problem_of_an_epoch_counts_at_the_next_epochs_beginning(tmp_path, caplog):
    keeper = make_keeper(tmp_path, through())
    source = next_source(keeper, 2)
    source.problem = Problem(False, "the disk is full", 1)
    # Resumed in the middle of the epoch, the training goes on to its end.
    assert isinstance(keeper.next(2, 10, source, 1), Writing)
    ended = keeper.next(2, 9, source, 2)
    assert isinstance(ended, FromImages) and ended.why == "the disk is full"
    assert "could not be written" in messages(caplog) and not source.store.path.exists()


def test_misfit_of_an_epoch_is_made_good_by_a_build(tmp_path, caplog):
    keeper = make_keeper(tmp_path, through())
    source = next_source(keeper, 2)
    source.problem = Problem(True, "a view is not projective", 1)
    built = keeper.next(2, 9, source, 2)
    assert isinstance(built, FromStore) and "materialize" not in built.store.manifest.made_from
    assert "A build makes the feature store, not live epochs, because a view is not projective" in messages(caplog)
    assert keeper.provider.decisions[2] == Decision("int4", built.store.path.name)


def test_misfit_while_a_written_store_is_completed_is_made_good_by_a_build(tmp_path, monkeypatch):
    keeper = make_keeper(tmp_path, through())
    source = next_source(keeper, 2)

    def misfit(self):
        raise GeometryMisfit("a view is not projective")

    monkeypatch.setattr(PartialStore, "finish", misfit)
    assert "materialize" not in keeper.next(2, 9, source, 2).store.manifest.made_from


def changed(keeper, source, tmp_path):
    """The keeper of a resumed training whose labels have changed."""
    again, previous = resumed(keeper, source, tmp_path, dataset=Rows(label=lambda row: (row + 1) % 5))
    return again, previous


def test_own_store_of_the_same_cut_that_does_not_match_any_more_is_deleted(tmp_path):
    keeper = make_keeper(tmp_path)
    source = next_source(keeper, 2)
    again, previous = changed(keeper, source, tmp_path)
    rebuilt = next_source(again, 2, previous, epoch=2)
    assert rebuilt.store.path != source.store.path and not source.store.path.exists()
    assert [path.name for path in tmp_path.iterdir()] == [rebuilt.store.path.name]
    assert again.provider.decisions[2] == Decision("int4", rebuilt.store.path.name)


def test_own_store_of_the_same_cut_that_does_not_match_any_more_leaves_the_budget(tmp_path):
    free = next_source(make_keeper(tmp_path / "free", manual("1:2", codec="fp32")), 2).store
    config = manual("1:2", codec="fp32", cache_budget=str(int(free.total_bytes * 1.3)))
    keeper = make_keeper(tmp_path / "run", config)
    source = next_source(keeper, 2)
    again, previous = changed(keeper, source, tmp_path / "run")
    rebuilt = next_source(again, 2, previous, epoch=2)
    assert rebuilt.store.manifest.codec == "fp32" and rebuilt.store.path != source.store.path


def test_store_before_that_was_deleted_for_the_budget_is_no_source_any_more(tmp_path, monkeypatch):
    """The first codec turns out not to fit after the store before has gone: the next one is built from images."""
    free = next_source(make_keeper(tmp_path / "free", manual("1:2", codec="fp32")), 2).store
    config = manual("1:2", codec="fp32", deepen="cache", cache_budget=str(int(free.total_bytes * 1.3)))
    keeper = make_keeper(tmp_path / "run", config)
    source = next_source(keeper, 2)
    build = store_provider.materialize

    def too_large_as_fp32(spec, group):
        if spec.codec == "fp32":
            raise OverLimit(10**9, spec.limit)
        return build(spec, group)

    monkeypatch.setattr(store_provider, "materialize", too_large_as_fp32)
    deeper = next_source(keeper, 3, source, epoch=2)
    assert isinstance(deeper, FromStore) and deeper.store.manifest.codec == "fp16"
    assert "deepened_from" not in deeper.store.manifest.made_from


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), OSError(28, "full"), pa.ArrowTypeError("an int")])
def test_store_that_cannot_be_completed_leaves_images(error, tmp_path, monkeypatch, caplog):
    keeper = make_keeper(tmp_path, through())
    source = next_source(keeper, 2)

    def fail(self):
        raise error

    monkeypatch.setattr(Announcer, "raises", ())
    monkeypatch.setattr(PartialStore, "finish", fail)
    assert isinstance(keeper.next(2, 9, source, 2), FromImages)
    assert type(error).__name__ in messages(caplog)


# Errors


def failing(error):
    def build(self, request):
        raise error

    return build


@pytest.mark.parametrize(
    ("explicit", "error", "survives"),
    [
        (True, BuildFailed("No space left on device"), True),
        (False, BuildFailed("No space left on device"), True),
        (True, ValueError("sample 3 is not finite"), False),
        (False, ValueError("sample 3 is not finite"), True),
        (True, RuntimeError("out of memory"), False),
        (False, RuntimeError("out of memory"), True),
    ],
)
def test_defaults_survive_what_explicit_settings_raise(explicit, error, survives, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(StoreProvider, "build", failing(error))
    keeper = make_keeper(tmp_path, explicit=explicit)
    if not survives:
        with pytest.raises(type(error)):
            next_source(keeper, 2)
        return
    source = next_source(keeper, 2)
    assert isinstance(source, FromImages)
    assert f"{error} ({type(error).__name__})" in messages(caplog) and source.why in messages(caplog)


def test_bug_under_the_defaults_is_named_and_traced_and_fails_the_tests(tmp_path, monkeypatch, caplog):
    caplog.set_level("DEBUG", logger="hf_freezecache")
    monkeypatch.setattr(StoreProvider, "build", failing(TypeError("an int is no path")))
    with pytest.raises(TypeError, match="an int is no path"):
        next_source(make_keeper(tmp_path, explicit=False), 2)
    monkeypatch.setattr(Announcer, "raises", ())
    assert isinstance(next_source(make_keeper(tmp_path, explicit=False), 2), FromImages)
    [warning] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert warning.getMessage().endswith("an int is no path (TypeError)")
    [traced] = [record for record in caplog.records if record.levelname == "DEBUG" and record.exc_info]
    assert traced.exc_info[0] is TypeError


def test_several_sizes_of_features_cannot_be_stored(tmp_path):
    class Sizes(Rows):
        def __getitem__(self, row):
            sample = super().__getitem__(row)
            return {**sample, "pixel_values": torch.zeros(3, 16, 16 if row < 12 else 32)}

    keeper = make_keeper(tmp_path, dataset=Sizes(), model=tiny_vit())
    source = next_source(keeper, 2)
    assert isinstance(source, FromImages) and "size" in source.why
