"""The entry of a training in `trainer_state.json`, of every version that can be resumed."""

import json

import pytest

from hf_freezecache.model.checkpoint import CheckpointError
from hf_freezecache.training.callback import STATE_VERSION
from hf_freezecache.training.checkpoint_state import read_state
from hf_freezecache.training.epoch_source import FromImages, FromStore, Problem, Writing, load_source

STORE, DEEPER, EVALUATION = "a" * 32, "b" * 32, "c" * 32


def version_1(cut=4, epoch=5, **session):
    """As the first release of the format wrote it."""
    caching = {
        "decisions": {"2": ["int8", STORE, None], "4": ["int4", DEEPER, 2]},
        "channel_weights": {"4": [0.5, 1.5]},
        "stores": [
            {"name": DEEPER, "bytes": 700, "built": True, "evaluation_cut": None},
            {"name": EVALUATION, "bytes": 80, "built": True, "evaluation_cut": 4},
        ],
        "current": [DEEPER, 4],
    }
    writing = {"cut": -1, "start": -1, "gave_up": -1, "done": -1, "fingerprint": None, "problem": None}
    writing |= session.pop("write_through", {})
    caching |= session.pop("caching", {})
    state = {
        "declined_cut": -1,
        "caching": caching,
        "phases": [],
        "samples": 96,
        "plain_flops_per_sample": 1000.0,
        "write_through": writing,
        **session,
    }
    attributes = {"cut": cut, "decided_epoch": epoch, "policy": {}, "session": state}
    return json.loads(json.dumps({"args": {}, "attributes": attributes}))


def test_no_entry_and_an_entry_without_a_session_are_nothing():
    assert read_state(None) is None
    assert (
        read_state({"args": {}, "attributes": {"cut": 0, "decided_epoch": 1, "policy": {}, "session": None}}) is None
    )
    assert read_state(version_1() | {"attributes": {"session": {}}}) is None


def test_this_version_is_read_as_it_is():
    attributes = {"version": STATE_VERSION, "session": {"source": {}}}
    assert read_state({"args": {}, "attributes": attributes}) is attributes


def test_later_version_is_refused_in_words():
    entry = {"args": {}, "attributes": {"version": STATE_VERSION + 1, "session": {"source": {}}}}
    with pytest.raises(CheckpointError, match=rf"version {STATE_VERSION + 1}.*reads version {STATE_VERSION}.*newer"):
        read_state(entry)


def test_several_callbacks_are_refused_in_words():
    with pytest.raises(CheckpointError, match="leave it out of `callbacks`"):
        read_state([version_1(), version_1()])


def test_version_1_in_a_replay_epoch():
    state = read_state(version_1())
    assert (state["version"], state["cut"], state["decided_epoch"]) == (STATE_VERSION, 4, 5)
    source = load_source(state["session"]["source"])
    assert isinstance(source, FromStore) and source.cut == 4
    stores = state["session"]["stores"]
    assert stores["decisions"]["2"] == {"codec": "int8", "store": STORE, "parent": None, "written": False}
    assert stores["decisions"]["4"] == {"codec": "int4", "store": DEEPER, "parent": 2, "written": False}
    assert stores["channel_weights"] == {"4": [0.5, 1.5]}
    assert stores["stores"] == [
        {"name": DEEPER, "bytes": 700, "built": True, "cut": 4, "is_evaluation": False},
        {"name": EVALUATION, "bytes": 80, "built": True, "cut": 4, "is_evaluation": True},
    ]
    assert state["session"]["flops"] == {"samples": 96, "plain_flops_per_sample": 1000.0}


def test_version_1_where_a_store_was_declined():
    state = read_state(version_1(declined_cut=4))
    source = load_source(state["session"]["source"])
    assert isinstance(source, FromImages) and source.cut == 4


def test_version_1_before_the_first_freeze():
    nothing = {"decisions": {}, "channel_weights": {}, "stores": [], "current": None}
    source = load_source(read_state(version_1(cut=0, caching=nothing))["session"]["source"])
    assert isinstance(source, FromImages) and source.cut == 0


@pytest.mark.parametrize("problem", [None, ["misfit", "a view is not projective", 5]])
def test_version_1_in_an_epoch_that_writes(problem):
    caching = {
        "decisions": {"4": ["int4", None, None]},
        "stores": [{"name": f"{DEEPER}.partial", "bytes": 700, "built": True, "evaluation_cut": None}],
        "current": None,
    }
    writing = {"cut": 4, "start": 5, "fingerprint": DEEPER, "problem": problem}
    state = read_state(version_1(caching=caching, write_through=writing))
    source = load_source(state["session"]["source"])
    assert isinstance(source, Writing)
    assert (source.cut, source.start, source.epoch, source.name) == (4, 5, 5, DEEPER)
    assert source.problem == (None if problem is None else Problem(True, "a view is not projective", 5))
    assert state["session"]["stores"]["stores"][0]["cut"] == 4
    assert state["session"]["stores"]["decisions"]["4"]["written"]


@pytest.mark.parametrize(("field", "written"), [("done", True), ("gave_up", False)])
def test_version_1_knows_whether_epochs_or_a_build_made_a_store(field, written):
    state = read_state(version_1(write_through={field: 4}))
    assert state["session"]["stores"]["decisions"]["4"]["written"] is written
