"""Whole trainings in processes of their own that need one store, and `freezecache clean --yes` beside a training."""

import pytest

from benchmarks.faults.company import CLEANINGS, clean_beside, race, train_alone

NAMES = list(CLEANINGS)


@pytest.mark.parametrize("name", NAMES)
def test_clean_beside_a_training_touches_nothing_that_it_uses(name, processes, tmp_path):
    found = clean_beside(name, tmp_path)
    assert (found.removed_beside, found.equal, found.rebuilt, found.left_after) == (0, True, 0, ())


@pytest.mark.slow
@pytest.mark.parametrize("trainings", [2, 3])
def test_trainings_that_need_one_store_build_it_once(trainings, processes, tmp_path):
    found = race(tmp_path / "race", train_alone(tmp_path / "alone"), trainings)
    assert (found.built, found.waited, found.equal, found.remains) == (1, trainings - 1, True, ())
