"""Bytes of a training's stores: which codecs are tried, and when outdated stores go first."""

from pathlib import Path

import pytest
from support.builds import make_spec
from support.helpers import manual, tiny_vit

from hf_freezecache.build.sizing import estimate_bytes
from hf_freezecache.distributed import Group
from hf_freezecache.training.budget import StoreBudget


@pytest.fixture
def spec(tmp_path):
    return make_spec(tiny_vit().eval(), tmp_path)


def make_budget(tmp_path, limit=None, **settings):
    budget = None if limit is None else str(limit)
    return StoreBudget(manual("1:2", cache_budget=budget, **settings), Group(), tmp_path)


def test_codecs_get_coarser_and_never_cost_accuracy(spec, tmp_path):
    budget = make_budget(tmp_path)
    assert list(budget.codecs("fp32", spec)) == ["fp32", "fp16", "int8", "int4", "int3"]
    assert list(budget.codecs("int4", spec)) == ["int4", "int3"]
    assert list(budget.codecs("int2", spec)) == ["int2"]


def test_without_a_budget_there_is_one_attempt_without_a_limit(spec, tmp_path):
    assert list(make_budget(tmp_path).attempts(spec)) == [(None, False)]


def test_store_that_fits_is_tried_first_and_without_outdated_ones_last(spec, tmp_path):
    needed = estimate_bytes(spec)
    budget = make_budget(tmp_path, 3 * needed)
    budget.holdings.add(tmp_path / "old", needed, built=True, cut=1)
    budget.holdings.add(tmp_path / "deeper", needed // 2, built=True, cut=spec.cut + 1)
    first, last = 3 * needed - needed - needed // 2, 3 * needed - needed // 2
    assert list(budget.attempts(spec)) == [(first, False), (last, True)]
    assert list(budget.attempts(spec, copies=2)) == [(last, True)]
    assert list(budget.attempts(spec, copies=3)) == []


def test_evaluation_stores_of_earlier_cuts_make_room_too(spec, tmp_path):
    needed = estimate_bytes(spec)
    budget = make_budget(tmp_path, needed)
    budget.holdings.add(tmp_path / "old", 10, built=True, cut=1, is_evaluation=True)
    assert list(budget.attempts(spec)) == [(needed, True)]


def test_disk_limits_unless_a_store_is_built_in_any_case(spec, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert make_budget(tmp_path, cache="auto").limit() == 900
    assert make_budget(tmp_path, 500, cache="auto").limit() == 500
    assert make_budget(tmp_path, 5000, cache="auto").limit() == 900
    assert make_budget(tmp_path, 5000).limit() == 5000


def test_reason_names_what_is_left_of_the_budget_or_of_the_disk(spec, tmp_path, monkeypatch):
    reason = make_budget(tmp_path, 100).too_large(spec, needed=123_000)
    assert reason == "it needs 123 kB even with codec `int4`, but only 100 B of `cache_budget` are left"
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    reason = make_budget(tmp_path, 5000, cache="auto").too_large(spec, needed=123_000)
    assert reason.endswith(f"but only 900 B of the disk of {tmp_path} are left")


def test_existing_store_is_held_beside_others_but_outdated_ones_do_not_count(spec, tmp_path):
    class Store:
        path, total_bytes = Path(tmp_path / "store"), 60

        class manifest:
            cut = 2

    budget = make_budget(tmp_path, 100)
    budget.holdings.add(tmp_path / "old", 90, built=True, cut=1)
    assert budget.holds(Store)
    budget.holdings.add(tmp_path / "other", 50, built=True, cut=3)
    assert not budget.holds(Store)
    budget.holdings.add(Store.path, 60, built=False, cut=2)
    assert budget.holds(Store)
