"""What `cache="auto"` does before it measures: nothing that a short training would have to pay for."""

import pytest
from support.builds import SlowRows
from support.helpers import manual, messages, run, tiny_vit
from support.keepers import freeze, make_keeper
from support.sessions import session_of

from hf_freezecache.estimate.pace import Pace
from hf_freezecache.estimate.probing import Prober
from hf_freezecache.training.epoch_source import FromImages, FromStore
from hf_freezecache.training.rehearsal import Rehearsal

#: 6 ranges of 4 rows: epochs of 6 ms.
SHORT, LONG = (Pace(step=step, load=0.0, start=0.0, prefix_share=0.5) for step in (0.001, 10.0))


@pytest.fixture
def done(monkeypatch):
    """Names of what was done for a store, in order."""
    calls = []

    def note(owner, name):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: calls.append(name) or original(*given))

    note(Rehearsal, "check")
    note(Prober, "_load")
    monkeypatch.setattr("hf_freezecache.build.spec_maker.look_closer", lambda *_: calls.append("look_closer") and None)
    monkeypatch.setattr(
        "hf_freezecache.build.spec_maker.fingerprint_inputs",
        lambda **_: calls.append("fingerprint") or {"some": "inputs"},
    )
    return calls


def test_hopeless_is_what_is_clear_without_measuring(tmp_path):
    worth = make_keeper(tmp_path / "cache", manual("1:2", cache="auto")).provider.worth
    assert "would save" in worth.why_hopeless(2, 5.0, SHORT)
    assert worth.why_hopeless(2, 5.0, LONG) is None and worth.why_hopeless(2, 5.0) is None
    assert "as many runs at most" in worth.why_hopeless(2, 1.0)


def test_a_store_that_may_be_there_is_looked_for(tmp_path):
    worth = make_keeper(tmp_path / "cache", manual("1:2", cache="auto")).provider.worth
    (tmp_path / "cache").mkdir()
    assert worth.why_hopeless(2, 5.0, SHORT) is not None
    (tmp_path / "cache" / ("f" * 32)).mkdir()
    assert worth.why_hopeless(2, 5.0, SHORT) is None


def test_always_is_never_hopeless(tmp_path):
    worth = make_keeper(tmp_path / "cache", manual("1:2", cache="always")).provider.worth
    assert worth.why_hopeless(2, 0.5, SHORT) is None


def test_a_decision_of_a_checkpoint_is_not_taken_again(tmp_path):
    keeper = make_keeper(tmp_path / "cache", manual("1:2"))
    freeze(keeper, 2)
    assert isinstance(keeper.next(2, 5.0, FromImages(), 1), FromStore)
    keeper.provider.worth.config = manual("1:2", cache="auto")
    assert keeper.provider.why_hopeless(2, 5.0, SHORT) is None
    assert keeper.provider.worth._prober.why_hopeless(keeper.provider.spec_maker.draft(2, "int4"), 5.0, SHORT)


def test_short_training_neither_measures_nor_rehearses_again_and_says_why(tmp_path, clock, caplog, done):
    """4 epochs of 22 rows, 0.1 ms each; the second one holds the rows that the loader fetched ahead."""
    data = SlowRows(clock, 1e-4)
    trainer = run(tiny_vit(), data, tmp_path, manual("1:2", cache="auto"))
    assert done == ["check"], "at the start, as the settings are explicit and nothing was known yet"
    assert not trainer.freeze_status().replaying and trainer.freeze_status().cut == 2
    text = messages(caplog)
    assert "No feature store for cut 2: the 3 epochs left take about 6.05 ms" in text and "at most" in text
    assert not (tmp_path / "_freeze_cache").exists()
    assert session_of(trainer).source.why in text


def test_last_epoch_alone_is_not_rehearsed_either(tmp_path, clock, done):
    trainer = run(tiny_vit(), SlowRows(clock, 1.0), tmp_path, manual("3:2", cache="auto"))
    assert done == [] and trainer.freeze_status().cut == 2
    trainer = run(tiny_vit(), SlowRows(clock, 1.0), tmp_path, manual("3:2"))
    assert done[0] == "check" and trainer.freeze_status().replaying


def test_long_training_is_measured_before_what_only_a_store_needs_and_once(tmp_path, clock, done):
    trainer = run(tiny_vit(), SlowRows(clock, 0.1), tmp_path, manual("1:2", cache="auto"), num_train_epochs=20)
    assert trainer.freeze_status().replaying
    assert done[0] == "check" and done.index("_load") < done.index("look_closer") < done.index("fingerprint")
    assert done.count("_load") == 2, "a range, then two"


def test_prefix_of_a_declined_cut_is_not_watched(tmp_path, clock):
    trainer = run(tiny_vit(), SlowRows(clock, 1e-4), tmp_path, manual("1:2", cache="auto"))
    assert session_of(trainer).proof._watch is None
