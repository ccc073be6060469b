"""Learning rates of blocks in whole trainings: they are those of groups that a user makes, and resume exactly."""

import pytest
import torch
from support.helpers import assert_same_weights, losses, manual, messages, pixel_dataset, run, tiny_vit, weights
from support.policies import Answers
from support.pretrained import settle
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer
from hf_freezecache.model.chain import BlockChain
from hf_freezecache.training.learning_rates import Fall

RATE, STEPS = 1e-3, 4  # learning rate, steps of an epoch
CONSTANT = dict(lr_scheduler_type="constant", weight_decay=0.05)


def blocks_of(model):
    """The block of every parameter; 4 for the head."""
    chain, blocks = BlockChain.from_model(model, probe=None), {}
    for cut in range(1, len(chain) + 1):
        for name in chain.prefix_parameters(cut):
            blocks.setdefault(name, cut - 1)
    return {name: blocks.get(name, len(chain)) for name, _ in model.named_parameters()}


def by_hand(model, factor_of):
    """An optimizer with a group for every parameter, and a scheduler that multiplies their rates by hand."""
    decayed = Trainer.get_decay_parameter_names(None, model)
    blocks, named = blocks_of(model), dict(model.named_parameters())
    groups = [{"params": [p], "weight_decay": 0.05 if name in decayed else 0.0} for name, p in named.items()]
    optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)  # as `Trainer`
    return optimizer, LambdaLR(optimizer, [lambda step, b=blocks[name]: factor_of(b, step) for name in named])


class Rates(TrainerCallback):
    """Notes what is outside of the steps: groups and learning rates."""

    def __init__(self):
        self.groups, self.rates, self.names = set(), [], None

    def on_step_end(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        self.groups.add(len(optimizer.param_groups))
        self.rates.append({group["lr"] for group in optimizer.param_groups} | set(lr_scheduler.get_last_lr()))


def fall(end):
    return Fall(0, end * STEPS).factor


@pytest.mark.parametrize("cache", ["never", "always"])
def test_annealed_training_is_that_of_groups_made_by_hand(cache, tmp_path):
    config = dict(cache=cache, codec="fp32")
    seen = Rates()
    ours = run(
        tiny_vit(), pixel_dataset(), tmp_path / "a", manual("1:2,3:3", anneal="cosine", **config),
        callbacks=[seen], **CONSTANT,
    )  # fmt: skip
    falls = [fall(1), fall(1), fall(3)]
    model = tiny_vit()
    hand = by_hand(model, lambda block, step: falls[block](step) if block < 3 else 1.0)
    other = run(model, pixel_dataset(), tmp_path / "b", manual("1:2,3:3", **config), optimizers=hand)
    assert losses(ours) == losses(other)
    assert_same_weights(weights(ours), weights(other))
    assert seen.groups == {2} and seen.rates == [{RATE}] * 16
    assert {entry["learning_rate"] for entry in ours.state.log_history if "loss" in entry} == {RATE}


def test_layer_decay_is_that_of_groups_made_by_hand(tmp_path):
    settings = FreezeCacheConfig(policy="none", layer_decay=0.5)
    ours = run(tiny_vit(), pixel_dataset(), tmp_path / "a", settings, **CONSTANT)
    model = tiny_vit()
    hand = by_hand(model, lambda block, step: 0.5 ** (4 - block))
    other = run(model, pixel_dataset(), tmp_path / "b", trainer_class=Trainer, optimizers=hand)
    assert losses(ours) == losses(other)
    assert_same_weights(weights(ours), weights(other))


def test_scaled_rates_and_layer_decay_multiply(tmp_path):
    settings = manual("2:2", cache="never", anneal="cosine", anneal_scale=True, layer_decay=0.5)
    ours = run(tiny_vit(), pixel_dataset(), tmp_path / "a", settings, **CONSTANT)
    model = tiny_vit()
    scaled = Fall(0, 2 * STEPS, height=2.0).factor  # frozen after half of the training
    hand = by_hand(model, lambda block, step: 0.5 ** (4 - block) * (scaled(step) if block < 2 else 1.0))
    other = run(model, pixel_dataset(), tmp_path / "b", manual("2:2", cache="never"), optimizers=hand)
    assert losses(ours) == losses(other)
    assert_same_weights(weights(ours), weights(other))


def test_blocks_with_a_small_factor_are_frozen_from_the_start_and_cached(tmp_path):
    rates = dict(layer_decay=0.5, codec="fp32", cache="always")
    by_factor = FreezeCacheConfig(policy="none", layer_decay_min=0.2, **rates)  # factors 1/16, 1/8, 1/4, 1/2
    ours = run(tiny_vit(), pixel_dataset(), tmp_path / "a", by_factor)
    other = run(tiny_vit(), pixel_dataset(), tmp_path / "b", manual("0:2", **rates))
    assert ours.freeze_status().cut == 2
    assert {phase.mode for phase in ours.freeze_cache_report().phases} == {"build", "replay"}
    assert_same_weights(weights(ours), weights(other))
    deeper = run(tiny_vit(), pixel_dataset(), tmp_path / "c", manual("0:1,2:3", layer_decay_min=0.2, **rates))
    assert [phase.cut for phase in deeper.freeze_cache_report().phases if phase.mode == "replay"] == [2, 3]


class SaveAt(TrainerCallback):
    def __init__(self, *steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step in self.steps


@pytest.mark.parametrize("step", [2, 4, 6])
@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}])
def test_resumed_is_uninterrupted(settings, step, tmp_path):
    config = manual("2:2,3:3", codec="fp32", anneal="cosine", layer_decay=0.7)
    whole = run(tiny_vit(), pixel_dataset(), tmp_path, config, callbacks=[SaveAt(step)], **settings)
    resumed = run(tiny_vit(), pixel_dataset(), tmp_path, config, resume=f"{tmp_path}/checkpoint-{step}", **settings)
    assert losses(resumed) == losses(whole)
    assert_same_weights(weights(resumed), weights(whole))


def delayed(tmp_path, **settings):
    config = FreezeCacheConfig(cache="never", anneal="cosine", anneal_epochs=2)
    policy = Answers(0, 2, 2, 2, 2)
    return run(tiny_vit(), pixel_dataset(), tmp_path, config, policy=policy, num_train_epochs=5, **settings)


def test_rule_that_decides_as_the_training_goes_anneals_from_its_decision(tmp_path):
    ours = delayed(tmp_path / "a", **CONSTANT)
    model = tiny_vit()
    falling = Fall(STEPS, 3 * STEPS).factor
    hand = by_hand(model, lambda block, step: falling(step) if block < 2 else 1.0)
    config = manual("3:2", cache="never")
    other = run(model, pixel_dataset(), tmp_path / "b", config, optimizers=hand, num_train_epochs=5)
    assert losses(ours) == losses(other)
    assert_same_weights(weights(ours), weights(other))


@pytest.mark.parametrize("step", [4, 6, 13])
def test_decision_that_waits_for_its_freeze_is_resumed(step, tmp_path):
    whole = delayed(tmp_path, callbacks=[SaveAt(step)])
    assert whole.freeze_status().cut == 2
    assert_same_weights(weights(delayed(tmp_path, resume=f"{tmp_path}/checkpoint-{step}")), weights(whole))


def test_a_plain_trainer_resumes_the_checkpoint_and_the_other_way_round(tmp_path, caplog):
    saved = dict(callbacks=[SaveAt(6)])
    annealed, plain = (manual("3:2", cache="never", anneal=anneal) for anneal in ("cosine", "none"))
    run(tiny_vit(), pixel_dataset(), tmp_path / "a", annealed, **saved)
    at = str(tmp_path / "a" / "checkpoint-6")
    assert len(torch.load(f"{at}/optimizer.pt", weights_only=True)["param_groups"]) == 2
    assert run(tiny_vit(), pixel_dataset(), tmp_path / "b", resume=at, trainer_class=Trainer).state.global_step == 16
    run(tiny_vit(), pixel_dataset(), tmp_path / "c", plain, resume=at)
    assert "other learning rates of blocks (anneal='cosine'" in messages(caplog)
    caplog.clear()
    run(tiny_vit(), pixel_dataset(), tmp_path / "d", trainer_class=Trainer, **saved)
    at = str(tmp_path / "d" / "checkpoint-6")
    assert run(tiny_vit(), pixel_dataset(), tmp_path / "e", annealed, resume=at).freeze_status().cut == 2


def test_one_line_and_the_report_say_what_is_done(tmp_path, caplog):
    settings = manual("1:2,3:3,9:4", cache="never", anneal="cosine", anneal_scale=True, layer_decay=0.5)
    trainer = run(tiny_vit(), pixel_dataset(), tmp_path, settings)
    lines = [record.message for record in caplog.records if record.message.startswith("Learning rates of blocks")]
    assert len(lines) == 1 and trainer.freeze_cache_report().learning_rates == lines[0]
    assert lines[0] in str(trainer.freeze_cache_report())
    assert "the head 1" in lines[0] and "vit.embeddings 0.0625" in lines[0]
    assert "those of 2 blocks from 'vit.embeddings' on to 0 by step 4, from 4 times" in lines[0]
    assert "to 0 by step 12" in lines[0] and "step 36" not in lines[0]


def test_a_rule_that_cannot_say_when_it_freezes_is_an_error_before_the_first_step(tmp_path):
    seen = Rates()
    config = FreezeCacheConfig(anneal="cosine")
    with pytest.raises(ValueError, match="Set anneal_epochs"):
        run(tiny_vit(), pixel_dataset(), tmp_path, config, policy=Answers(0, 2, 2, 2), callbacks=[seen])
    with pytest.raises(ValueError, match="knows its schedule"):
        run(tiny_vit(), pixel_dataset(), tmp_path, manual("1:2", anneal="cosine", anneal_epochs=1), callbacks=[seen])
    assert not seen.rates


def test_a_second_training_has_its_own_rates(tmp_path):
    trainer = run(tiny_vit(), pixel_dataset(), tmp_path, manual("1:2", cache="never", anneal="cosine"))
    inner = trainer.optimizer.optimizer
    assert not inner._optimizer_step_pre_hooks and not inner._optimizer_step_post_hooks
    trainer.train()
    assert trainer.state.global_step == 16 and len(trainer.optimizer.param_groups) == 2


def test_optimizers_that_do_not_follow_are_an_error_before_the_first_step(tmp_path):
    seen, model = Rates(), tiny_vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Rprop(model.parameters())
    with pytest.raises(ValueError, match="does not work with Rprop: .*anneal='none'"):
        config = manual("1:2", cache="never", anneal="cosine")
        run(model, pixel_dataset(), tmp_path, config, optimizers=(optimizer, None), callbacks=[seen])
    assert not seen.rates
    assert_same_weights(before, model.state_dict())


def test_an_overridden_create_optimizer_and_decay_names_are_respected(tmp_path):
    class Own(FreezeCacheTrainer):
        def create_optimizer(self, model=None):
            if self.optimizer is None:
                self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
            return self.optimizer

    class NoDecay(FreezeCacheTrainer):
        def get_decay_parameter_names(self, model):
            return []

    def adamw(groups):
        return torch.optim.AdamW(groups, lr=RATE, weight_decay=0.0, fused=True)

    def sgd(groups):
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01)

    config = FreezeCacheConfig(policy="none", layer_decay=0.5)
    for trainer_class, make in ((Own, sgd), (NoDecay, adamw)):
        folder = tmp_path / trainer_class.__name__
        ours = run(tiny_vit(), pixel_dataset(), folder / "ours", config, trainer_class=trainer_class, **CONSTANT)
        model = tiny_vit()
        optimizer = make([{"params": [parameter]} for parameter in model.parameters()])
        factors = [lambda step, block=block: 0.5 ** (4 - block) for block in blocks_of(model).values()]
        hand = optimizer, LambdaLR(optimizer, factors)
        other = run(model, pixel_dataset(), folder / "hand", trainer_class=Trainer, optimizers=hand)
        assert_same_weights(weights(ours), weights(other))


class SetsRates(TrainerCallback):
    """Sets the rates of groups before every step."""

    def __init__(self, rates_of):
        self.rates_of = rates_of

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        for group, rate in zip(optimizer.param_groups, self.rates_of(state.global_step), strict=True):
            group["lr"] = rate


def test_an_optimizer_with_a_scheduler_of_the_users(tmp_path):
    model = tiny_vit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    scheduler = LambdaLR(optimizer, lambda step: 0.9**step)
    config = manual("2:2", cache="never", anneal="cosine")
    ours = run(model, pixel_dataset(), tmp_path / "a", config, optimizers=(optimizer, scheduler))
    model, falling = tiny_vit(), fall(2)
    blocks = list(blocks_of(model).values())
    optimizer = torch.optim.AdamW([{"params": [p]} for p in model.parameters()], lr=RATE, fused=True)
    by_step = SetsRates(
        lambda step: [RATE * 0.9**step * (falling(step) if block < 2 else 1.0) for block in blocks]
    )  # fmt: skip
    config = manual("2:2", cache="never")
    other = run(model, pixel_dataset(), tmp_path / "b", config, optimizers=(optimizer, None), callbacks=[by_step])
    assert losses(ours) == losses(other)
    assert_same_weights(weights(ours), weights(other))
    assert [group["lr"] for group in ours.optimizer.param_groups] == [RATE * 0.9**16]


@pytest.mark.parametrize("scheduler", ["cosine", "warmup_stable_decay", "reduce_lr_on_plateau"])
def test_schedules_are_what_they_are_without(scheduler, tmp_path):
    more = dict(warmup_stable_decay={"num_stable_steps": 4, "num_decay_steps": 8}).get(scheduler)
    settings = dict(lr_scheduler_type=scheduler, warmup_steps=4, eval_strategy="epoch", metric_for_best_model="loss")
    settings |= dict(lr_scheduler_kwargs=more) if more else {}
    seen = {}
    for name, anneal in (("a", "cosine"), ("b", "none")):
        trainer = run(
            tiny_vit(), pixel_dataset(), tmp_path / name, manual("3:2", cache="never", anneal=anneal),
            eval_dataset=pixel_dataset(8), **settings,
        )  # fmt: skip
        seen[name] = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert seen["a"] == seen["b"] and len(set(seen["a"])) > (scheduler != "reduce_lr_on_plateau")


def test_head_starts_and_annealing_go_together(tmp_path):
    config = manual("1:2", cache="never", anneal="cosine", head_start_epochs=1, head_start="always")
    trainer = run(settle(tiny_vit()), pixel_dataset(), tmp_path, config)
    assert trainer.freeze_cache_report().phases[0].mode == "head_start" and trainer.freeze_status().cut == 2


@pytest.mark.parametrize("rates", [{"anneal": "cosine"}, {"layer_decay": 0.5, "layer_decay_min": 0.1}])
def test_a_trial_before_the_training_leaves_nothing_behind(rates, tmp_path):
    """It takes steps of the training's own optimizer; then the training is that of the schedule that was chosen."""
    long = dict(num_train_epochs=8, logging_steps=20)
    config = FreezeCacheConfig(policy="auto", cache="never", head_start_epochs=0, **rates)
    ours = run(settle(tiny_vit()), pixel_dataset(160), tmp_path / "a", config, **long)
    assert "trial" in [phase.mode for phase in ours.freeze_cache_report().phases]
    points = "0:2" if ours.freeze_status().cut == 2 else "4:3"
    other = run(settle(tiny_vit()), pixel_dataset(160), tmp_path / "b", manual(points, cache="never", **rates), **long)
    assert losses(ours) == losses(other)
    assert_same_weights(weights(ours), weights(other))
