"""The bytes that a training's stores take."""

from hf_freezecache.cache.holdings import DISK_SHARE, Holdings, disk_limit


def test_limit_is_what_the_stores_leave(tmp_path):
    holdings = Holdings(100)
    assert holdings.limit() == 100
    holdings.add(tmp_path / "a", 30, built=True, cut=1)
    holdings.add(tmp_path / "b", 20, built=False, cut=1)
    assert holdings.limit() == 50
    assert holdings.limit(without=[tmp_path / "a"]) == 80
    holdings.drop(tmp_path / "a")
    assert holdings.limit() == 80


def test_no_budget_is_no_limit(tmp_path):
    holdings = Holdings(None)
    holdings.add(tmp_path / "a", 30, built=True, cut=1)
    assert holdings.limit() is None


def test_only_what_was_built_here_may_be_removed(tmp_path):
    holdings = Holdings(None)
    holdings.add(tmp_path / "a", 30, built=True, cut=1)
    holdings.add(tmp_path / "b", 20, built=False, cut=1)
    holdings.add(tmp_path / "a", 30, built=False, cut=1)  # found again by the resumed training
    assert holdings.has_built(tmp_path / "a")
    assert not holdings.has_built(tmp_path / "b")
    assert not holdings.has_built(tmp_path / "c")


def test_state_comes_back(tmp_path):
    holdings = Holdings(100)
    holdings.add(tmp_path / "a", 30, built=True, cut=1)
    holdings.add(tmp_path / "b", 20, built=False, cut=2, is_evaluation=True)
    again = Holdings(100)
    again.load_state_dict(holdings.state_dict(), tmp_path)
    assert again.limit() == 50 and again.has_built(tmp_path / "a") and not again.has_built(tmp_path / "b")
    assert (
        again.outdated(3, evaluations_only=True) == [tmp_path / "b"] and again.outdated(2, evaluations_only=True) == []
    )
    assert again.outdated(3) == [tmp_path / "a", tmp_path / "b"] and again.outdated(2) == [tmp_path / "a"]


def test_store_of_the_same_cut_that_is_not_in_use_is_outdated(tmp_path):
    holdings = Holdings(100)
    holdings.add(tmp_path / "old", 30, built=True, cut=2)
    holdings.add(tmp_path / "new", 40, built=True, cut=2)
    holdings.add(tmp_path / "evaluation", 10, built=True, cut=2, is_evaluation=True)
    assert holdings.outdated(2, in_use=[tmp_path / "new"]) == [tmp_path / "old"]
    assert holdings.outdated(1) == []


def test_room_is_a_share_of_the_free_disk_and_at_most_the_budget(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    missing = tmp_path / "not" / "there"
    assert disk_limit(missing) == int(1000 * DISK_SHARE)
    assert disk_limit(missing, budget=100) == 100
    assert disk_limit(missing, budget=5000) == int(1000 * DISK_SHARE)
    assert not missing.exists()
