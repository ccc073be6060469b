"""How fast live epochs run, as a training shows it without being measured."""

import pytest
from support.builds import SlowRows
from support.helpers import manual, run, tiny_vit
from support.sessions import session_of

from hf_freezecache.training.live_clock import Lap, LiveClock


def slow(clock, batches, seconds=0.5):
    for batch in batches:
        clock(seconds)
        yield batch


def test_waiting_for_batches_is_noted(clock):
    timer = LiveClock()
    timer.begin(seconds=7.0)
    for _ in range(2):  # `Trainer` takes a few batches at a time from the same iterator
        assert list(timer.waiting(slow(clock, [1, 2]))) == [1, 2]
        clock(3.0)
    assert timer.last is None
    timer.end(cut=2, seconds=15.0)
    assert timer.last == Lap(2, 8.0, (0.5,) * 4)
    assert timer.last.step == 2.0 and timer.last.load(workers=0) == 0.5


def test_epoch_that_changes_its_source_tells_nothing(clock):
    timer = LiveClock()
    timer.begin(0.0)
    list(timer.waiting(slow(clock, [1])))
    timer.give_up()
    timer.end(0, 9.0)
    assert timer.last is None
    timer.begin(9.0)
    timer.end(0, 9.0)
    assert timer.last is None, "no batch was taken"


def test_first_batch_shows_what_loader_processes_take_to_start():
    lap = Lap(0, 4.0, (2.0, 0.25, 0.25, 0.0))
    assert lap.load(workers=2) == pytest.approx(0.5 / 3)
    assert lap.start(workers=2) == pytest.approx(2.0 - 0.5 / 3)
    assert lap.load(workers=0) == 2.5 / 4 and lap.start(workers=0) == 0.0


def test_a_training_knows_the_pace_of_its_last_live_epoch(tmp_path, clock):
    settings = dict(per_device_train_batch_size=4, num_train_epochs=2)
    trainer = run(tiny_vit(), SlowRows(clock, 0.01), tmp_path, manual("1:2", cache="never"), **settings)
    accounts = session_of(trainer).accounts
    assert accounts.clock.last.cut == 2
    pace = accounts.pace(cut=3, workers=0)
    assert pace.step == pace.load == pytest.approx(22 * 0.01 / 6), "nothing but loading moves the clock"
    assert 0 < pace.prefix_share < 1
