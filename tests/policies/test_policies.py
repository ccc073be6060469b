"""When to freeze: the schedules and their syntax."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_freezecache.policies import FreezePolicy, LinearPolicy, ManualPolicy, Moment, NonePolicy
from hf_freezecache.policies.schedule import FreezePoint, parse_freeze_points, scheduled_cut
from hf_freezecache.training.callback import FreezeCallback

EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True)


def cuts(policy, epochs, blocks=12):
    policy.start(blocks)
    return [policy.decide(Moment(epoch, epochs, 0, 100, 0, blocks)) for epoch in range(epochs)]


def test_manual_points_hold_from_their_epoch_on():
    assert cuts(ManualPolicy("1:4,3:8"), 5) == [0, 4, 4, 8, 8]
    assert cuts(ManualPolicy(" 1 : 4 , 3 : 8 "), 5) == [0, 4, 4, 8, 8]
    assert cuts(ManualPolicy("0:2"), 3) == [2, 2, 2]
    assert cuts(ManualPolicy("2:12"), 3) == [0, 0, 12]
    assert cuts(ManualPolicy("7:3"), 3) == [0, 0, 0]


@pytest.mark.parametrize(
    ("fraction", "epochs", "epoch"),
    [("0.1", 30, 3), ("0.25", 10, 3), ("0.25", 4, 1), (".5", 5, 3), ("0.", 4, 0), ("0.0", 4, 0), ("1.0", 4, 4)]
    + [("0.7", 10, 7), ("0.3", 10, 3), ("0.6", 5, 3), ("0.55", 100, 55), ("0.07", 100, 7), ("0.01", 30, 1)],
)
def test_fractions_round_up_to_an_epoch(fraction, epochs, epoch):
    (point,) = parse_freeze_points(f"{fraction}:8")
    assert point.epoch(epochs) == epoch
    assert cuts(ManualPolicy(f"{fraction}:8"), epochs) == [0] * epoch + [8] * (epochs - epoch)


@pytest.mark.parametrize("policy", [ManualPolicy("1:4,3:8"), ManualPolicy("0.2:4,0.6:8"), LinearPolicy()])
def test_next_change_is_the_epoch_at_which_the_cut_moves(policy):
    epochs, decided = 5, cuts(policy, 5)
    for epoch, cut in enumerate(decided):
        later = [other for other in range(epoch + 1, epochs) if decided[other] > cut]
        moment = Moment(epoch, epochs, 0, 100, cut, 12)
        assert policy.next_change(moment) == (later[0] if later else None)


def test_next_change_is_unknown_to_a_rule_that_does_not_say():
    assert Answers(1).next_change(Moment(0, 5, 0, 100, 1, 12)) is None


def test_callback_ends_a_store_where_the_cut_moves_on():
    callback, mover = FreezeCallback(ManualPolicy("0:1,2:2")), Mover()
    callback.attach(mover)
    run_epochs(callback, mover, 0, 4)
    assert mover.epochs_left == [2, 1, 3, 2]


def test_integer_is_an_epoch_and_number_with_a_point_a_fraction():
    assert parse_freeze_points("1:4") == [FreezePoint(1, 4)]
    assert parse_freeze_points("1.0:4") == [FreezePoint(1.0, 4)]
    assert cuts(ManualPolicy("1:4"), 3) == [0, 4, 4]
    assert cuts(ManualPolicy("1.0:4"), 3) == [0, 0, 0]


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


def test_manual_cut_beyond_the_chain_is_refused_with_the_deepest():
    policy = ManualPolicy("1:4,3:14")
    policy.start(14)
    with pytest.raises(ValueError, match="cut 14.*13 blocks.*13"):
        policy.start(13)


@pytest.mark.parametrize(
    ("start", "end", "fraction", "stages", "blocks", "epochs"),
    [
        (0.25, 0.5, 0.75, 2, 13, 12),
        (0.25, 0.5, 0.75, 2, 13, 10),
        (0.0, 1.0, 1.0, 4, 12, 20),
        (0.3, 0.3, 0.5, 1, 12, 10),
        (0.1, 0.9, 0.6, 5, 17, 30),
    ],
)
def test_linear_follows_its_formula(start, end, fraction, stages, blocks, epochs):
    from fractions import Fraction
    from math import ceil

    exact = {name: Fraction(str(value)) for name, value in dict(start=start, end=end, fraction=fraction).items()}
    expected = []
    for epoch in range(epochs):
        cut = 0
        for stage in range(1, stages + 1):
            when = exact["start"] + (exact["end"] - exact["start"]) * Fraction(stage - 1, max(stages - 1, 1))
            if epoch >= ceil(when * epochs):
                cut = round(exact["fraction"] * blocks * Fraction(stage, stages))
        expected.append(cut)
    assert cuts(LinearPolicy(start, end, fraction, stages), epochs, blocks) == expected


def test_linear_defaults_freeze_in_two_steps():
    # 13 blocks: round(.375 * 13) = 5 at a quarter, round(.75 * 13) = 10 at half of 12 epochs.
    assert cuts(LinearPolicy(), 12, 13) == [0] * 3 + [5] * 3 + [10] * 6


def test_none_never_freezes():
    assert cuts(NonePolicy(), 5) == [0] * 5


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


@EXAMPLES
@given(
    st.tuples(st.integers(0, 100), st.integers(0, 100)).map(sorted),
    st.integers(0, 100),
    st.integers(1, 6),
    st.integers(1, 40),
    st.integers(1, 60),
)
def test_linear_never_decreases_nor_passes_its_bounds(window, most, stages, blocks, epochs):
    policy = LinearPolicy(window[0] / 100, window[1] / 100, most / 100, stages)
    found = cuts(policy, epochs, blocks)
    assert found == sorted(found)
    assert all(0 <= cut <= round(most / 100 * blocks) for cut in found)


# The callback: what is decided stays decided


class Answers(FreezePolicy):
    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def decide(self, moment):
        self.asked.append(moment.epoch)
        return self.answers[moment.epoch]

    def state_dict(self):
        return {"asked": list(self.asked)}

    def load_state_dict(self, state):
        self.asked = list(state["asked"])


class Mover:
    num_blocks = 6

    def __init__(self):
        self.cuts, self.epochs_left, self.watched = [], [], []

    def watch(self, signals):
        self.watched.append(signals)

    def agree(self, value):
        return value

    def begin_epoch(self, moment, epochs_left):
        self.cuts.append(moment.cut)
        self.epochs_left.append(epochs_left)

    def state(self):
        return {"some": "state"}


def run_epochs(callback, mover, first, last, max_steps=20):
    from types import SimpleNamespace

    args = SimpleNamespace(gradient_accumulation_steps=1)
    state = SimpleNamespace(epoch=float(first), global_step=4 * first, max_steps=max_steps, num_train_epochs=5)
    callback.on_train_begin(args, state, None)
    for epoch in range(first, last):
        state.epoch, state.global_step = float(epoch), 4 * epoch
        callback.on_epoch_begin(args, state, None, train_dataloader=range(4))
    return mover.cuts


def test_callback_cut_never_moves_back():
    callback, mover = FreezeCallback(Answers(0, 3, 1, 4, 2)), Mover()
    callback.attach(mover)
    assert run_epochs(callback, mover, 0, 5) == [0, 3, 3, 4, 4]


@pytest.mark.parametrize("answer", [7, -1, 2.0, True, None, "2"])
def test_callback_refuses_an_impossible_answer(answer):
    callback, mover = FreezeCallback(Answers(answer)), Mover()
    callback.attach(mover)
    with pytest.raises(ValueError, match="Answers decided .* from 0 to 6"):
        run_epochs(callback, mover, 0, 1)


def test_callback_restored_does_not_decide_again():
    """A checkpoint at the end of epoch 1 and one in the middle of it decide the same from there on."""
    policy = Answers(0, 3, 4, 5, 5)
    callback, mover = FreezeCallback(policy), Mover()
    callback.attach(mover)
    run_epochs(callback, mover, 0, 2)
    saved = callback.state()["attributes"]
    assert saved["session"] == {"some": "state"} and saved["cut"] == 3

    changed = Answers(6, 6, 4, 6, 6)
    again, other = FreezeCallback(changed), Mover()
    again.attach(other)
    again.restore(saved)
    assert changed.asked == [0, 1]
    assert run_epochs(again, other, 1, 3) == [3, 4]
    assert changed.asked == [0, 1, 2]


def test_callback_starts_every_training_from_nothing():
    policy = Answers(2, 3, 4, 5, 5)
    callback, mover = FreezeCallback(policy), Mover()
    callback.attach(mover)
    run_epochs(callback, mover, 0, 5)
    again = Mover()
    callback.attach(again)
    assert (callback.cut, callback.decided_epoch) == (0, -1)
    assert run_epochs(callback, again, 0, 1) == [2]


def test_callback_tells_the_epochs_that_remain():
    callback, mover = FreezeCallback(Answers(1, 1, 1)), Mover()
    callback.attach(mover)
    run_epochs(callback, mover, 0, 3, max_steps=10)
    assert mover.epochs_left == [2.5, 1.5, 0.5]


def test_callback_has_what_the_policy_observes_collected():
    policy, mover = Answers(1), Mover()
    policy.observes = frozenset({"gradients"})
    callback = FreezeCallback(policy)
    callback.attach(mover)
    run_epochs(callback, mover, 0, 1)
    assert mover.watched == [{"gradients"}]


def test_callback_without_a_training_does_nothing():
    callback = FreezeCallback(Answers(1))
    callback.attach(None)
    callback.on_epoch_begin(None, None, None)
    assert callback.cut == 0 and callback.policy.asked == []
