"""The callback asks the policy once an epoch, and a decision stays."""

import sys

import pytest
from support.policies import Answers

from hf_freezecache.policies import ManualPolicy
from hf_freezecache.training.callback import FreezeCallback


class Mover:
    num_blocks, batches = 6, 4

    def __init__(self):
        self.cuts, self.epochs_left, self.watched, self.announced, self.rehearsed = [], [], [], [], None

    def watch(self, signals):
        self.watched.append(signals)

    def check_data(self, loader):
        self.checked = loader

    def try_freezing(self, cut, max_steps, max_grad_norm, scheduler):
        self.started = getattr(self, "started", 0) + 1

    def plan_head_start(self, cut, epochs):
        self.frozen_from_start = cut, epochs

    def rehearse(self, epochs):
        self.rehearsed = epochs

    def announce(self, message):
        self.announced.append(message)

    def broadcast(self, value):
        return value

    def expect(self, coming, moment, steps_per_epoch):
        self.expected = coming, moment.epoch, steps_per_epoch

    def begin_step(self, step):
        self.step = step

    def begin_epoch(self, moment, epochs_left):
        self.cuts.append(moment.cut)
        self.epochs_left.append(epochs_left)

    def state_dict(self):
        return {"some": "state"}


def run_epochs(callback, mover, first, last, max_steps=20, loader=range(4), num_train_epochs=5):
    from types import SimpleNamespace

    args = SimpleNamespace(gradient_accumulation_steps=1, max_grad_norm=1.0)
    state = SimpleNamespace(
        epoch=float(first), global_step=4 * first, max_steps=max_steps, num_train_epochs=num_train_epochs
    )
    callback.on_train_begin(args, state, None, train_dataloader=loader)
    for epoch in range(first, last):
        state.epoch, state.global_step = float(epoch), 4 * epoch
        callback.on_epoch_begin(args, state, None, train_dataloader=loader)
    return mover.cuts


@pytest.mark.parametrize(("max_steps", "epochs"), [(20, {2: 4.0, 5: 2.0}), (18, {2: 3.5, 5: 1.5}), (10, {2: 1.5})])
def test_planned_cuts_are_rehearsed_with_the_epochs_that_remain_for_them(max_steps, epochs):
    callback, mover = FreezeCallback(ManualPolicy("1:2,3:5,9:6")), Mover()
    callback.attach(mover)
    run_epochs(callback, mover, 0, 0, max_steps=max_steps)
    assert mover.rehearsed == epochs


def test_callback_cut_never_moves_back():
    callback, mover = FreezeCallback(Answers(0, 3, 1, 4, 2)), Mover()
    callback.attach(mover)
    assert run_epochs(callback, mover, 0, 5) == [0, 3, 3, 4, 4]


def test_loader_without_a_length_is_counted_by_the_trainers_own():
    asked = []

    class Rule(Answers):
        def decide(self, moment):
            asked.append((moment.epoch, moment.num_epochs))
            return super().decide(moment)

    for loader, epochs in ((range(4), 5), (iter(()), sys.maxsize)):
        callback, mover = FreezeCallback(Rule(0, 3, 3, 4, 4)), Mover()
        callback.attach(mover)
        run_epochs(callback, mover, 0, 5, loader=loader, num_train_epochs=epochs)
        assert mover.checked is loader
    assert asked[:5] == asked[5:] == [(epoch, 5) for epoch in range(5)]


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
    again.load_state_dict(saved)
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


def test_callback_ends_a_store_where_the_cut_moves_on():
    callback, mover = FreezeCallback(ManualPolicy("0:1,2:2")), Mover()
    callback.attach(mover)
    run_epochs(callback, mover, 0, 4)
    assert mover.epochs_left == [2, 1, 3, 2]


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
