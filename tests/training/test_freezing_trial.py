"""The trial before a training: what it measures, and that it leaves nothing behind."""

import json
import re

import pytest
import torch
from support.helpers import (
    assert_same_weights,
    losses,
    make_args,
    manual,
    messages,
    pixel_dataset,
    run,
    tiny_vit,
    weights,
)
from support.pretrained import settle
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer
from hf_freezecache.policies import AutoPolicy
from hf_freezecache.reporting.run_record import read_record
from hf_freezecache.training import freezing_trial, head_batches

#: 40 steps: with a fifth of them on trial, a trial of eight, with two batches held out.
LONG = {"num_train_epochs": 2, "logging_steps": 20}


@pytest.fixture(autouse=True)
def longer_trials(monkeypatch):
    monkeypatch.setattr(freezing_trial, "_SHARE", 0.2)


class Stops(TrainerCallback):
    """The trial is over before the first step: what comes later is of no interest."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


class Remembering(AutoPolicy):
    """Keeps its trial, and decides as if it had found this difference."""

    def __init__(self, sign):
        super().__init__()
        self.sign, self.trials = sign, []

    def take_trial(self, trial, num_blocks):
        self.trials.append(trial)
        if trial is not None:
            better, worse = [0.5], [1.0]
            losses = (better, worse) if self.sign < 0 else (worse, better)
            trial = type(trial)(trial.cut, trial.steps, trial.samples, *losses)
        return super().take_trial(trial, num_blocks)


def auto(policy, folder, model=None, **settings):
    model = settle(tiny_vit()) if model is None else model
    config = FreezeCacheConfig(cache="never")
    return run(model, pixel_dataset(160), folder, config, policy=policy, **{**LONG, **settings})


@pytest.mark.parametrize(
    ("sign", "points", "settings"),
    [
        (-1, "0:2", {}),
        (1, "1:3", {"optim": "sgd", "lr_scheduler_type": "constant"}),
        (-1, "0:2", {"warmup_steps": 20, "max_grad_norm": 0.1}),
    ],
    ids=["adamw", "sgd", "warm-up"],
)
def test_the_training_is_that_of_the_schedule_that_was_chosen(sign, points, settings, tmp_path):
    trainer = auto(Remembering(sign), tmp_path / "auto", **settings)
    other = run(
        settle(tiny_vit()),
        pixel_dataset(160),
        tmp_path / "other",
        manual(points, cache="never"),
        **{**LONG, **settings},
    )
    assert losses(trainer) == losses(other)
    assert_same_weights(weights(trainer), weights(other))


ACCUMULATING = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


def of_all_items(outputs, labels, num_items_in_batch):
    return cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({}, [1 - step / 40 for step in range(8)]),
        ({"warmup_steps": 4}, [0, 1 / 4, 1 / 2, 3 / 4, 1, 35 / 36, 34 / 36, 33 / 36]),
        ({"warmup_steps": 16}, [1 / 16, 3 / 16, 5 / 16, 7 / 16, 9 / 16, 11 / 16, 13 / 16, 15 / 16]),
        (ACCUMULATING, [1 - step / 40 for step in range(8)]),
        ({**ACCUMULATING, "compute_loss_func": of_all_items}, [1 - step / 40 for step in range(8)]),
    ],
    ids=["decay", "warm-up", "warm-up that is longer than the trial", "accumulation", "accumulation of sums"],
)
def test_what_it_measures_is_a_training_by_hand(settings, shares, tmp_path):
    """Steps of eight samples, at these shares of the learning rate."""
    model = settle(tiny_vit(hidden_dropout_prob=0.0), head="none")
    policy, data = Remembering(-1), pixel_dataset(160)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = FreezeCacheConfig(cache="never")
    own = {**LONG, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, **settings}
    run(model, data, tmp_path, config, policy=policy, callbacks=[Stops()], **own)
    [trial] = policy.trials
    assert (trial.cut, trial.steps, trial.samples) == (3, 8, 16)
    order = torch.randperm(160, generator=torch.Generator().manual_seed(3)).tolist()
    size = own.get("per_device_train_batch_size", 8)
    held_out = [order[first : first + size] for first in range(0, 16, size)]
    training = [order[16 + 8 * step : 24 + 8 * step] for step in range(8)]

    def loss(rows):
        batch = data[rows]
        return cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["labels"])

    for frozen, expected in ((True, trial.frozen), (False, trial.live)):
        model.load_state_dict(before)
        trained = [
            value
            for name, value in model.named_parameters()
            if not frozen or not ("embeddings" in name or re.search(r"layers?\.[01]\.", name))
        ]
        model.requires_grad_(True)
        model.train()
        for share, rows in zip(shares, training, strict=True):
            gradients = torch.autograd.grad(loss(rows), trained)
            with torch.no_grad():
                for value, gradient in zip(trained, gradients, strict=True):
                    value -= 0.05 * share * gradient
        assert expected == pytest.approx([float(loss(rows).detach()) for rows in held_out], rel=1e-4)


@pytest.mark.parametrize("epochs", [1, 0], ids=["of the training", "of the trial alone"])
def test_a_head_start_leaves_the_held_out_samples_alone(epochs, tmp_path, monkeypatch):
    rows = {}
    for module, name in ((head_batches, "of_batches"), (freezing_trial, "of_rows")):
        seen, original = rows.setdefault(module, []), getattr(module, name)

        def noting(source, own, *args, seen=seen, original=original):
            seen.append(own)
            return original(source, own, *args)

        monkeypatch.setattr(module, name, noting)
    config = FreezeCacheConfig(cache="never", head_start_epochs=epochs)
    policy = Remembering(-1)
    run(settle(tiny_vit(), head="classifier"), pixel_dataset(160), tmp_path, config, policy=policy, **LONG)
    [held_out, _] = rows[freezing_trial]
    trained_on = [row for batches in rows[head_batches] for batch in batches for row in batch]
    assert len(held_out) == 16 and len(trained_on) == 144 and not set(held_out) & set(trained_on)
    assert policy.trials[0].samples == 16


def test_a_new_head_gets_a_head_start_for_the_trial_alone(tmp_path):
    policy = Remembering(-1)
    trainer = auto(policy, tmp_path / "auto", settle(tiny_vit(), head="classifier"))
    other = run(settle(tiny_vit()), pixel_dataset(160), tmp_path / "other", manual("0:2", cache="never"), **LONG)
    assert losses(trainer) == losses(other)
    assert [phase.mode for phase in trainer.freeze_cache_report().phases] == ["trial", "live"]
    # The head has learned before the steps on trial.
    assert sum(policy.trials[0].live) / 2 < losses(other)[0]


def test_a_resumed_training_does_as_it_would_have_done(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 30}
    first = Remembering(-1)
    whole = auto(first, tmp_path / "whole", **settings)
    again = Remembering(1)
    resumed = auto(
        again, tmp_path / "again", settle(tiny_vit()), resume=str(tmp_path / "whole" / "checkpoint-30"), **settings
    )
    assert len(first.trials) == 1 and not again.trials
    assert_same_weights(weights(whole), weights(resumed))
    assert again.why == first.why


@pytest.mark.parametrize(
    ("points", "before", "after"), [(None, 0, 3), ("0:1", 1, 3), ("0:4", 4, 4)], ids=["Trainer", "manual", "deeper"]
)
def test_a_checkpoint_of_another_rule_goes_on_without_a_trial(points, before, after, tmp_path, caplog):
    settings = {"save_strategy": "epoch", "num_train_epochs": 3}
    config, trainer_class = (None, Trainer) if points is None else (manual(points, cache="never"), FreezeCacheTrainer)
    run(settle(tiny_vit()), pixel_dataset(), tmp_path, config, trainer_class=trainer_class, **settings)
    config, policy, folder = FreezeCacheConfig(cache="never"), Remembering(-1), tmp_path / "checkpoint-4"
    trainer = run(settle(tiny_vit()), pixel_dataset(), tmp_path, config, str(folder), policy=policy, **settings)
    cuts = [entry["freeze/cut"] for entry in trainer.state.log_history if "loss" in entry and entry["step"] > 4]
    assert not policy.trials and cuts == 4 * [before] + 4 * [after]
    said = [line for line in messages(caplog).splitlines() if line.startswith("Policy auto decides by a trial")]
    assert said == [policy.why] and "what is frozen already stays frozen" in policy.why
    assert policy.why in str(trainer.freeze_cache_report())


def test_a_short_training_has_no_trial(tmp_path, monkeypatch):
    monkeypatch.setattr(freezing_trial, "_SHARE", 0.05)
    policy = Remembering(-1)
    trainer = auto(policy, tmp_path)
    assert policy.trials == [None] and "too short" in policy.why
    assert trainer.freeze_status().cut == 3 and "trial" not in [
        phase.mode for phase in trainer.freeze_cache_report().phases
    ]


def test_what_is_chosen_is_in_the_report(tmp_path):
    policy = Remembering(-1)
    report = auto(policy, tmp_path, save_strategy="steps", save_steps=30).freeze_cache_report()
    entry = json.loads(json.dumps(report.to_dict()))["choice"]
    assert entry["schedule"] == "0:2" and entry["policy"] == "auto" and entry["why"] == policy.why
    assert entry["numbers"]["difference"] == -0.5 and entry["numbers"]["steps"] == 8
    assert "'0:2'" in str(report) and policy.why in str(report)
    assert read_record(tmp_path).choice == entry
    resumed = auto(Remembering(1), tmp_path, resume=str(tmp_path / "checkpoint-30"))
    assert resumed.freeze_cache_report().choice == report.choice


def test_its_cost_is_in_the_report(tmp_path):
    report = auto(AutoPolicy(), tmp_path).freeze_cache_report()
    [phase] = [phase for phase in report.phases if phase.mode == "trial"]
    assert phase.steps == 16 and phase.flops > 0
    assert report.totals.trial_seconds == phase.seconds > 0
    assert report.totals.flops == pytest.approx(sum(phase.flops for phase in report.phases))
    assert "trial" in str(report)


def test_the_name_is_a_setting(tmp_path):
    args = make_args(tmp_path)
    trainer = FreezeCacheTrainer(tiny_vit(), args, freeze_cache=FreezeCacheConfig(policy="auto", max_frozen=0.5))
    assert isinstance(trainer._freeze_policy, AutoPolicy) and trainer._freeze_policy.max_frozen == 0.5
