"""Freeze points: their syntax, and the cut that they give in an epoch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.policies import EXAMPLES, cuts

from hf_freezecache.policies import LinearPolicy, ManualPolicy, Moment
from hf_freezecache.policies.schedule import FreezePoint, parse_freeze_points, scheduled_cut


def test_integer_is_an_epoch_and_number_with_a_point_a_fraction():
    assert parse_freeze_points("1:4") == [FreezePoint(1, 4)]
    assert parse_freeze_points("1.0:4") == [FreezePoint(1.0, 4)]
    assert cuts(ManualPolicy("1:4"), 3) == [0, 4, 4]
    assert cuts(ManualPolicy("1.0:4"), 3) == [0, 0, 0]


@pytest.mark.parametrize(
    ("fraction", "epochs", "epoch"),
    [("0.1", 30, 3), ("0.25", 10, 3), ("0.25", 4, 1), (".5", 5, 3), ("0.", 4, 0), ("0.0", 4, 0), ("1.0", 4, 4)]
    + [("0.7", 10, 7), ("0.3", 10, 3), ("0.6", 5, 3), ("0.55", 100, 55), ("0.07", 100, 7), ("0.01", 30, 1)],
)
def test_fractions_round_up_to_an_epoch(fraction, epochs, epoch):
    (point,) = parse_freeze_points(f"{fraction}:8")
    assert point.epoch(epochs) == epoch
    assert cuts(ManualPolicy(f"{fraction}:8"), epochs) == [0] * epoch + [8] * (epochs - epoch)


def test_mixed_epochs_and_fractions_take_the_deepest_cut_that_has_come():
    assert cuts(ManualPolicy("3:4,0.25:8"), 8) == [0, 0, 8, 8, 8, 8, 8, 8]


@pytest.mark.parametrize(
    "text",
    ["", " ", "4", "1:", ":4", "1:4;3:8", "1:4,", "-1:4", "1:-4", "1:4.0", "a:4", "1:b", "1e-1:4", "1:4,,3:8", ".:4"]
    + ["1.5:4", "3:8,1:4", "1:8,3:4", "1:4,1:8", "0.5:4,0.25:8", "nan:3", "1:4:5", "0x1:4"],
)
def test_freeze_points_that_are_not_understood_are_refused(text):
    with pytest.raises(ValueError) as caught:
        parse_freeze_points(text)
    assert "freeze point" in str(caught.value)


@st.composite
def schedules(draw):
    """Valid freeze points, epochs and fractions mixed."""
    epochs = sorted(draw(st.sets(st.integers(0, 40), max_size=4)))
    fractions = sorted(draw(st.sets(st.integers(0, 100), max_size=4)))
    whens = [str(epoch) for epoch in epochs] + [f"{fraction / 100:.2f}" for fraction in fractions]
    depths = sorted(draw(st.lists(st.integers(0, 20), min_size=len(whens), max_size=len(whens))))
    return ",".join(f"{when}:{cut}" for when, cut in zip(whens, depths, strict=True))


@EXAMPLES
@given(schedules().filter(bool), st.integers(1, 60))
def test_scheduled_cut_never_decreases(text, epochs):
    points = parse_freeze_points(text)
    found = [scheduled_cut(points, epoch, epochs) for epoch in range(epochs + 1)]
    assert found == sorted(found)
    assert set(found) <= {0, *(point.cut for point in points)}
    # By the end of training every point has come, but for epochs after it.
    assert found[-1] == max([point.cut for point in points if point.epoch(epochs) <= epochs], default=0)


@pytest.mark.parametrize("policy", [ManualPolicy("1:4,3:8"), ManualPolicy("0.2:4,0.6:8"), LinearPolicy()])
def test_next_change_is_the_epoch_at_which_the_cut_moves(policy):
    epochs, decided = 5, cuts(policy, 5)
    for epoch, cut in enumerate(decided):
        later = [other for other in range(epoch + 1, epochs) if decided[other] > cut]
        moment = Moment(epoch, epochs, 0, 100, cut, 12)
        assert policy.next_change(moment) == (later[0] if later else None)
