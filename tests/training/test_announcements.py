"""One line says what will be frozen, and what of the settings has no effect."""

from support.policies import Answers

from hf_freezecache.policies import FrozenFromStart, LinearPolicy, ManualPolicy
from hf_freezecache.training.announcements import (
    describe_freeze,
    describe_other_rates,
    describe_other_rule,
    describe_schedule,
)


def test_schedule_is_one_line_with_the_way_out():
    line = describe_schedule(LinearPolicy(), num_blocks=13, num_epochs=12)
    assert line == (
        "From epoch 3, 5 of 13 blocks are frozen, from epoch 6, 10 of 13: policy linear; "
        "policy='none' keeps all training."
    )


def test_freeze_point_beyond_the_training_is_named():
    line = describe_schedule(ManualPolicy("1:2,4:3"), num_blocks=4, num_epochs=4)
    assert line.startswith("From epoch 1, 2 of 4 blocks are frozen: policy manual")
    assert line.endswith("Without effect, as epochs count from 0 and the last one is 3: cut 3 in epoch 4.")


def test_schedule_that_freezes_nothing_says_so():
    line = describe_schedule(ManualPolicy("5:2"), num_blocks=4, num_epochs=3)
    assert line.startswith("Nothing will be frozen in this training of 3 epochs (manual, freeze_points='5:2').")
    assert "cut 2 in epoch 5" in line
    line = describe_schedule(LinearPolicy(max_frozen=0.05), num_blocks=4, num_epochs=8)
    assert line.startswith("Nothing will be frozen") and "max_frozen=0.05" in line


def test_head_alone_is_said():
    line = describe_schedule(ManualPolicy("0:4"), num_blocks=4, num_epochs=3)
    assert line.startswith("From epoch 0, 4 of 4 blocks are frozen (only the head trains): policy manual")


def test_what_freezes_blocks_from_the_start_is_named_with_the_way_out():
    policy = FrozenFromStart(ManualPolicy("2:3"), lambda blocks: 1, "layer_decay_min=0.1")
    assert describe_schedule(policy, num_blocks=4, num_epochs=3) == (
        "From epoch 0, 1 of 4 blocks are frozen, from epoch 2, 3 of 4: policy manual with layer_decay_min=0.1; "
        "policy='none' and layer_decay_min=0 keep all training."
    )


def test_resumed_training_says_what_is_frozen_already():
    line = describe_schedule(ManualPolicy("1:2,3:3"), num_blocks=4, num_epochs=4, cut=2)
    assert line.startswith("2 of 4 blocks are frozen, from epoch 3, 3 of 4: policy manual")


def test_rule_that_decides_later_is_announced_at_its_first_freeze():
    assert describe_schedule(Answers(0, 2), num_blocks=4, num_epochs=4) is None
    assert describe_freeze(Answers(0, 2), 2, 4, 1).startswith("From epoch 1, 2 of 4 blocks are frozen: policy Answers")


def test_other_learning_rates_than_the_checkpoints_are_said():
    assert describe_other_rates(None, None) is None and describe_other_rates("a", "a") is None
    assert "(no learning rates of their own) than this training has (a)" in describe_other_rates(None, "a")
    assert "(a) than this training has (no learning rates of their own)" in describe_other_rates("a", None)


def test_other_rule_than_the_checkpoints_is_said():
    assert describe_other_rule("manual, freeze_points='1:2'", ManualPolicy("1:2"), 2) is None
    line = describe_other_rule("manual, freeze_points='1:2'", ManualPolicy([(1, 3)]), 2)
    assert "freeze_points='1:2'" in line and "freeze_points='1:3'" in line and "2 blocks" in line
