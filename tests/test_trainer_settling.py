"""Trainings whose rules look at them: decisions, resumes, and what they compose with."""

import pytest
import torch
from support.helpers import assert_same_weights, losses, make_args, pixel_dataset, run, tiny_resnet, tiny_vit, weights
from support.predictors import ByDrift

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer, FreezePolicy
from hf_freezecache.policies import AutoFreezePolicy, EgeriaPolicy, SimFreezePolicy
from hf_freezecache.smartfrz import SmartFrzPolicy
from hf_freezecache.training import similarities

#: Rules that freeze something in trainings as small as these.
RULES = {
    "autofreeze": lambda: AutoFreezePolicy(intervals=4),
    "simfreeze": lambda: SimFreezePolicy(tolerance=0.3, window=2),
    "egeria": lambda: EgeriaPolicy(tolerance=5.0, window=2),
    "smartfrz": lambda: SmartFrzPolicy(ByDrift(limit=-0.22)),
}


@pytest.fixture(autouse=True)
def readings_in_every_step(monkeypatch):
    monkeypatch.setattr(similarities, "_SHARE", 9.0)


def trained(folder, policy, model=None, resume=None, cache="always", config=None, **settings):
    config = {"cache": cache, "codec": "fp32", "feature_cache_dir": str(folder / "cache"), **(config or {})}
    settings = {"num_train_epochs": 6, **settings}
    model = tiny_vit() if model is None else model
    return run(model, pixel_dataset(), folder, FreezeCacheConfig(**config), policy=policy, resume=resume, **settings)


def cuts_of(trainer):
    return [entry["freeze/cut"] for entry in trainer.state.log_history if "freeze/cut" in entry]


SOME_SLOW = ["autofreeze", "simfreeze", "smartfrz", pytest.param("egeria", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", SOME_SLOW)
@pytest.mark.parametrize("step", [5, pytest.param(8, marks=pytest.mark.slow)])
def test_resumed_training_decides_as_an_uninterrupted_one(name, step, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": step}
    whole = trained(tmp_path, RULES[name](), **settings)
    again = trained(tmp_path, RULES[name](), tiny_vit(7), str(tmp_path / f"checkpoint-{step}"), **settings)
    assert cuts_of(whole)[-1] > 0 and cuts_of(again) == cuts_of(whole)
    assert losses(again) == losses(whole)
    assert_same_weights(weights(again), weights(whole))


@pytest.mark.parametrize("name", SOME_SLOW)
def test_cached_is_freeze_only(name, tmp_path):
    frozen, cached = (
        run(
            tiny_resnet(),
            pixel_dataset(size=32),
            tmp_path / mode,
            FreezeCacheConfig(cache=mode, codec="fp32"),
            policy=RULES[name](),
            num_train_epochs=6,
        )
        for mode in ("never", "always")
    )
    assert cuts_of(frozen) == cuts_of(cached) and cuts_of(frozen)[-1] > 0
    assert losses(frozen) == losses(cached)
    assert_same_weights(weights(frozen), weights(cached))


@pytest.mark.parametrize("name", ["freezeout", "autofreeze", "egeria", "simfreeze"])
def test_rules_have_names(name, tmp_path):
    trainer = trained(tmp_path, None, config={"policy": name, "max_frozen": 0.5}, cache="never", num_train_epochs=4)
    assert trainer.freeze_status().cut <= 2
    by_name = FreezeCacheTrainer(
        model=tiny_vit(), args=make_args(tmp_path), train_dataset=pixel_dataset(), policy=name
    )
    assert by_name.freeze_settings.policy == name


@pytest.mark.parametrize("name", SOME_SLOW)
def test_learning_rates_fall_between_a_decision_and_its_freeze(name, tmp_path):
    plain = trained(tmp_path / "plain", RULES[name](), cache="never")
    with pytest.raises(ValueError, match="anneal_epochs"):
        trained(tmp_path / "refused", RULES[name](), cache="never", config={"anneal": "cosine"})
    annealed = trained(
        tmp_path / "annealed", RULES[name](), cache="never", config={"anneal": "cosine", "anneal_epochs": 1}
    )
    first = [next(place for place, cut in enumerate(cuts_of(trainer)) if cut) for trainer in (plain, annealed)]
    assert first[1] == first[0] + 4  # steps of an epoch
    assert losses(annealed)[: first[0]] == losses(plain)[: first[0]]
    assert losses(annealed)[first[0] + 1] != losses(plain)[first[0] + 1]


def test_a_rule_goes_on_from_blocks_that_layer_decay_has_frozen(tmp_path):
    config = {"layer_decay": 0.5, "layer_decay_min": 0.2}  # the stem and the first of three blocks
    trainer = trained(tmp_path, RULES["simfreeze"](), cache="never", config=config)
    assert cuts_of(trainer)[0] == 2 and cuts_of(trainer)[-1] == 4


def test_freezeout_falls_as_it_freezes(tmp_path):
    config = {"policy": "freezeout", "anneal": "cosine", "anneal_scale": True}
    trainer = trained(tmp_path, None, cache="never", config=config)
    assert cuts_of(trainer)[-1] == 3
    assert "cosine" in trainer.freeze_cache_report().learning_rates


def test_gradients_are_of_the_whole_step_under_accumulation_and_bf16(tmp_path):
    class Sees(FreezePolicy):
        observes = frozenset({"gradients", "activations", "similarities"})

        def start(self, num_blocks):
            self.norms, self.read = [], []

        def observe(self, moment, blocks):
            gradients = [p.grad for block in blocks for p in block.parameters.values() if p.grad is not None]
            self.norms.append(float(torch.stack(torch._foreach_norm(gradients)).norm()))
            self.read += [block.similarities is not None for block in blocks[:1]]
            assert all(block.activation.shape[0] == 4 for block in blocks)

        def decide(self, moment):
            return 0

    policy = Sees()
    steps = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "bf16": True, "num_train_epochs": 2}
    trainer = trained(tmp_path, policy, cache="never", max_grad_norm=0.5, **steps)
    assert len(policy.norms) == 8 and sum(policy.read) >= 2
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert all(0.2 < norm <= 0.501 for norm in policy.norms) and min(logged) > 0.5  # clipped, the head's apart


@pytest.mark.parametrize("name", ["simfreeze", pytest.param("autofreeze", marks=pytest.mark.slow)])
def test_compiled_models_are_observed(name, tmp_path):
    compiled = trained(
        tmp_path,
        RULES[name](),
        cache="never",
        torch_compile=True,
        torch_compile_backend="eager",
    )
    plain = trained(tmp_path / "plain", RULES[name](), cache="never")
    assert cuts_of(compiled) == cuts_of(plain)


def test_activations_of_compiled_models_are_observed(tmp_path):
    class Sees(FreezePolicy):
        observes = frozenset({"activations"})

        def start(self, num_blocks):
            self.sums = []

        def observe(self, moment, blocks):
            self.sums.append([None if b.activation is None else float(b.activation.sum()) for b in blocks])

        def decide(self, moment):
            return 0

    compiled, plain = Sees(), Sees()
    model = dict(hidden_dropout_prob=0.0)
    backend = {"torch_compile": True, "torch_compile_backend": "eager", "num_train_epochs": 1}
    # Code of the same class, compiled before for a model without hooks, must not run in place of the hooks.
    trained(tmp_path / "before", "none", tiny_vit(**model), cache="never", **backend)
    trained(tmp_path, compiled, tiny_vit(**model), cache="never", **backend)
    trained(tmp_path / "plain", plain, tiny_vit(**model), cache="never", num_train_epochs=1)
    assert compiled.sums == [pytest.approx(sums, rel=1e-4) for sums in plain.sums]


def test_gradients_of_a_scaled_loss_are_refused(tmp_path):
    trainer = FreezeCacheTrainer(
        model=tiny_vit(),
        args=make_args(tmp_path, max_grad_norm=0.0),
        train_dataset=pixel_dataset(),
        policy="autofreeze",
    )
    trainer.accelerator.scaler = object()  # as with fp16 on a GPU
    with pytest.raises(ValueError, match="autofreeze observes gradients.*set max_grad_norm"):
        trainer.train()
