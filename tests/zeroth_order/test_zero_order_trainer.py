"""Zeroth-order trainings: the steps of a slow reference, resumed and replayed bit for bit, with nothing but losses."""

from __future__ import annotations

from itertools import accumulate

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
    tiny_resnet,
    tiny_vit,
    weights,
)
from support.pretrained import settle
from support.zero_order import CONFIGS, COPY, PlainZeroOrder, Seen, train, weights_of
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer, TrainerCallback

from hf_freezecache import ZeroOrderConfig, ZeroOrderMixin, ZeroOrderTrainer, plan
from hf_freezecache.rng import RngState
from hf_freezecache.training.trainer_hooks import FreezeCacheMixin


class FreezesOutside(FreezeCacheMixin, ZeroOrderMixin, Trainer):
    """The other order of the two mixins."""


# Steps


@pytest.mark.parametrize("kind", CONFIGS)
def test_step_is_that_of_a_slow_reference(kind, tmp_path):
    """Every direction as a whole tensor, weights set from a copy, the update written out."""
    seen, batches = Seen(), []

    class Noting(PlainZeroOrder):
        def training_step(self, model, inputs, *args, **kwargs):
            batches.append({name: value.clone() for name, value in inputs.items()})
            return super().training_step(model, inputs, *args, **kwargs)

    settings = {**COPY, "estimates": 2, "eps": 1e-2, **CONFIGS[kind]}
    trainer = train(tmp_path, Noting, callbacks=[seen], zero_order=settings, max_steps=3, learning_rate=1e-2)

    model, config = tiny_vit().eval(), ZeroOrderConfig(**settings)
    held = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    order = [dict(model.named_parameters())[names[id(parameter)]] for parameter in held]
    perturbation = config.make_perturbation(order, seed=3)

    def direction(number):
        before = [parameter.detach().clone() for parameter in order]
        for parameter in order:
            parameter.data.zero_()
        perturbation.add(number, 1.0)
        found = [parameter.detach().clone() for parameter in order]
        put(before)
        return found

    def put(values):
        for parameter, value in zip(order, values, strict=True):
            parameter.data.copy_(value)

    for step, batch in enumerate(batches):
        before = [parameter.detach().clone() for parameter in order]

        def loss_at(z, factor, before=before, batch=batch):
            put([value + factor * each for value, each in zip(before, z, strict=True)])
            with torch.no_grad():
                loss = float(model(**batch).loss)
            put(before)
            return loss

        z = [direction(step * config.estimates + number) for number in range(config.estimates)]
        if config.estimator == "one_sided":
            slopes = torch.tensor([(loss_at(each, 1e-2) - loss_at(each, 0.0)) / 1e-2 for each in z]).double()
            slopes = slopes / slopes.std()
        else:
            slopes = torch.tensor([(loss_at(each, 1e-2) - loss_at(each, -1e-2)) / 2e-2 for each in z]).double()
        put(
            [
                value - 1e-2 * sum(float(slope) * each[place] for slope, each in zip(slopes, z, strict=True)) / len(z)
                for place, value in enumerate(before)
            ]
        )
        found = seen.weights[step]
        for name, parameter in model.named_parameters():
            assert torch.allclose(found[name], parameter, rtol=1e-3, atol=2e-5), f"step {step}: {name}"
        assert not torch.equal(found["classifier.weight"], before[0])


@pytest.mark.parametrize("kind", CONFIGS)
def test_loss_falls(kind, tmp_path):
    rate = 2e-2 if kind == "one-sided" else 3e-3
    trainer = train(tmp_path, zero_order=CONFIGS[kind], num_train_epochs=25, learning_rate=rate)
    found = losses(trainer)
    assert sum(found[-9:]) < 0.97 * sum(found[:9])
    numbers = [entry for entry in trainer.state.log_history if "zero_order/projected_gradient" in entry]
    assert len(numbers) == len(found) and all(entry["grad_norm"] > 0 for entry in numbers)
    if kind == "gaussian":
        [entry, *_] = numbers
        slope = (entry["zero_order/loss_ahead"] - entry["zero_order/loss_behind"]) / 2e-3
        assert entry["zero_order/projected_gradient"] == pytest.approx(slope, rel=1e-6)
        assert entry["loss"] == pytest.approx(
            (entry["zero_order/loss_ahead"] + entry["zero_order/loss_behind"]) / 2, rel=1e-5
        )


def test_nothing_but_losses_is_made(tmp_path):
    """No gradient, no state of the optimizer, no tensor kept for a backward pass, no random number of others."""
    kept, seen, generators = [], Seen(), []

    class Watched(PlainZeroOrder):
        def training_step(self, *args, **kwargs):
            before = RngState()
            with torch.autograd.graph.saved_tensors_hooks(
                lambda value: kept.append(value) or value, lambda value: value
            ):
                loss = super().training_step(*args, **kwargs)
            generators.append(before.is_current())
            return loss

    trainer = train(tmp_path, Watched, callbacks=[seen], gradient_accumulation_steps=2)
    assert "compute_loss" not in vars(trainer) and "backward" not in vars(trainer.accelerator)
    assert not seen.gradients and not seen.states and not trainer.optimizer.state
    assert all(value.numel() == 1 for value in kept)
    assert generators and all(generators)


def peak_memory(run) -> int:
    """Bytes that are in use at a time beside what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_use = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert in_use
    return max(accumulate(in_use))


@pytest.mark.parametrize("kind", CONFIGS)
def test_step_takes_the_memory_of_inference(kind, tmp_path):
    """32 samples, whose activations take five times the bytes of the weights; the first step makes the pool."""
    peaks = []

    class Measured(PlainZeroOrder):
        def training_step(self, model, inputs, *args, **kwargs):
            def infer():
                with torch.no_grad():
                    model.eval()(**inputs)

            step, found = super().training_step, []
            infer()
            peaks.append((peak_memory(infer), peak_memory(lambda: found.append(step(model, inputs, *args, **kwargs)))))
            return found[0]

    train(
        tmp_path,
        Measured,
        zero_order=CONFIGS[kind],
        train_dataset=pixel_dataset(rows=64),
        per_device_train_batch_size=32,
        num_train_epochs=1,
    )
    assert len(peaks) == 2
    for inference, step in peaks:
        assert step <= 1.1 * inference


def test_loss_that_takes_labels_out_of_the_batch_gets_them_every_time(tmp_path):
    trainer = train(tmp_path, label_smoothing_factor=0.1, eval_strategy="epoch", eval_dataset=pixel_dataset(rows=8))
    found = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == 6 and all(abs(entry["zero_order/projected_gradient"]) > 0 for entry in found)
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 2


def test_batch_norm_statistics_stay(tmp_path):
    model = tiny_resnet()
    before = {name: value.clone() for name, value in model.named_buffers()}
    trainer = PlainZeroOrder(
        model=model,
        args=make_args(tmp_path, num_train_epochs=1),
        train_dataset=pixel_dataset(rows=16, size=32),
    )
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_accumulated_batches_are_one_batch(tmp_path):
    """One direction, the mean of the slopes."""
    whole = train(tmp_path / "whole", learning_rate=1e-2, zero_order=COPY)
    parts = train(
        tmp_path / "parts",
        learning_rate=1e-2,
        zero_order=COPY,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    assert whole.state.global_step == parts.state.global_step == 6
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    for name, value in weights(whole).items():
        assert torch.allclose(value, weights(parts)[name], rtol=1e-3, atol=1e-4), name


def test_larger_estimates_are_clipped(tmp_path):
    free, clipped = (
        train(tmp_path / str(norm), max_steps=1, max_grad_norm=norm, learning_rate=1e-2, zero_order=COPY)
        for norm in (0.0, 1e-3)
    )
    slope = abs(free.state.log_history[0]["zero_order/projected_gradient"])
    assert slope > 1e-3 and clipped.state.log_history[0]["grad_norm"] == pytest.approx(slope)
    start = weights(free.__class__(model=tiny_vit(), args=make_args(tmp_path)))
    name = "classifier.weight"
    moved = (weights(free)[name] - start[name]).norm() / (weights(clipped)[name] - start[name]).norm()
    assert float(moved) == pytest.approx(slope / 1e-3, rel=0.02)


def test_weights_decay_where_the_optimizer_of_trainer_lets_them(tmp_path):
    plain, decayed = (
        train(tmp_path / str(decay), max_steps=1, learning_rate=0.1, weight_decay=decay, zero_order=COPY)
        for decay in (0.0, 0.5)
    )
    start = dict(tiny_vit().named_parameters())
    for name in ("classifier.weight", "vit.layernorm.weight"):
        difference = weights(plain)[name] - weights(decayed)[name]
        share = 0.05 if name == "classifier.weight" else 0.0
        assert torch.allclose(difference, share * start[name], atol=1e-5), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_resumed_training_is_the_same_bit_for_bit(kind, tmp_path):
    """A ResNet: plain `Trainer` loses weights of a ViT when it resumes."""
    settings = dict(
        zero_order=CONFIGS[kind],
        train_dataset=pixel_dataset(rows=24, size=32),
        num_train_epochs=2,
        save_strategy="steps",
        save_steps=2,
        lr_scheduler_type="linear",
        learning_rate=1e-2,
    )
    whole = train(tmp_path, model=tiny_resnet(), **settings)
    resumed = train(tmp_path, model=tiny_resnet(), **settings, resume=str(tmp_path / "checkpoint-4"))
    assert_same_weights(weights(whole), weights(resumed))
    assert losses(whole) == losses(resumed)


def test_second_training_goes_on(tmp_path):
    trainer = train(tmp_path)
    before = weights(trainer)
    trainer.train()
    assert not torch.equal(before["classifier.weight"], weights(trainer)["classifier.weight"])


def test_model_is_prepared_again_by_a_later_training(tmp_path):
    """Accelerate leaves one that it has prepared as it is: without a wrapper, processes would drift apart."""
    trainer = train(tmp_path, max_steps=1)
    assert "_is_accelerate_prepared" not in vars(trainer.model)


# With features


@pytest.mark.parametrize("trainer_class", [ZeroOrderTrainer, FreezesOutside])
@pytest.mark.parametrize("kind", ["gaussian", "pool", "on the fly", "one-sided"])
def test_training_on_features_is_the_frozen_training_bit_for_bit(trainer_class, kind, tmp_path):
    runs = {}
    for name, config in {
        "cached": manual("1:2,2:3", codec="fp32"),
        "frozen": manual("1:2,2:3", cache="never"),
    }.items():
        runs[name] = train(
            tmp_path / name,
            trainer_class,
            config=config,
            zero_order=CONFIGS[kind],
            num_train_epochs=4,
            learning_rate=1e-2,
        )
    assert runs["cached"].freeze_status().replaying and not runs["frozen"].freeze_status().replaying
    assert losses(runs["cached"]) == losses(runs["frozen"])
    assert_same_weights(weights(runs["cached"]), weights(runs["frozen"]))


def test_steps_on_features_run_the_suffix_alone(tmp_path):
    model, calls = tiny_vit(), []
    for place, layer in enumerate(model.vit.layers):
        layer.attention.register_forward_hook(lambda *_, place=place: calls.append(place))

    class Clears(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            calls.clear()

    train(
        tmp_path,
        ZeroOrderTrainer,
        model=model,
        config=manual("0:3", codec="fp32"),
        callbacks=[Clears()],
        num_train_epochs=1,
    )
    assert calls == [2, 2]  # ahead and behind


@pytest.mark.parametrize("kind", ["gaussian", "one-sided"])
def test_plan_measures_steps_without_a_backward_pass(kind, tmp_path, monkeypatch):
    """Every step runs the suffix for each loss; nothing is moved, and no gradient is asked for."""
    model, config = tiny_vit(), ZeroOrderConfig(**CONFIGS[kind])
    before, runs = weights_of(model), []
    model.vit.layers[2].register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))

    def refuse(*args, **kwargs):
        raise AssertionError("a backward pass")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    args = make_args(tmp_path)
    found = plan(model, pixel_dataset(rows=24), args=args, cuts=[2], batches=2, zero_order=config)
    [row] = found.rows
    assert row.live_step_seconds > row.replay_step_seconds > 0 and found.live_step_seconds > 0
    # Steps at cut 2 and of plain training, of two batches and one to warm up.
    assert runs.count(False) >= 2 * 3 * config.forward_passes and not any(runs)
    assert all(torch.equal(value, before[name]) for name, value in weights_of(model).items())
    parameters = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert row.peak_memory_bytes == parameters


def test_store_pays_earlier_as_every_step_would_run_the_frozen_blocks_twice(tmp_path, caplog):
    """With one epoch left, a store saves a training with gradients one run of the blocks, and its build takes one."""
    explicit = {"config": manual("1:3", cache="auto", report="none"), "num_train_epochs": 2}
    found = train(tmp_path / "zero", ZeroOrderTrainer, **explicit)
    assert "would save as many runs at most" not in messages(caplog)
    assert found._session.context.forward_passes == 2
    run(tiny_vit(), pixel_dataset(rows=24), tmp_path / "plain", explicit["config"], num_train_epochs=2)
    assert "would save as many runs at most" in messages(caplog)


@pytest.mark.parametrize("estimates", [1, 2])
def test_total_flos_count_no_backward_pass(estimates, tmp_path):
    """`Trainer` counts a backward pass as two forward passes."""
    plain = Trainer(
        model=tiny_vit(), args=make_args(tmp_path / "plain", num_train_epochs=2), train_dataset=pixel_dataset(rows=24)
    )
    plain.train()
    trainer = train(tmp_path / "zero", zero_order={"estimates": estimates})
    assert trainer.state.global_step == plain.state.global_step
    assert trainer.state.total_flos == pytest.approx(plain.state.total_flos * 2 * estimates / 3)


def test_report_counts_forward_passes_alone(tmp_path):
    config = manual("1:3", codec="fp32")
    trainer = train(tmp_path, ZeroOrderTrainer, config=config, zero_order={"estimator": "one_sided", "estimates": 3})
    phases = {phase.mode: phase for phase in trainer.freeze_cache_report().phases}
    meter = trainer._session.meter
    assert phases["live"].flops == pytest.approx(4 * 24 * meter.per_sample("eval"))
    assert phases["replay"].flops == pytest.approx(4 * 24 * meter.per_sample("eval_replay"))


def test_resumed_training_on_features_is_the_same_bit_for_bit(tmp_path):
    settings = dict(
        config=manual("1:2", codec="fp32"),
        zero_order=CONFIGS["pool"],
        num_train_epochs=3,
        save_strategy="steps",
        save_steps=1,
    )
    whole = train(tmp_path, ZeroOrderTrainer, **settings)
    for step in (2, 5):
        resumed = train(tmp_path, ZeroOrderTrainer, **settings, resume=str(tmp_path / f"checkpoint-{step}"))
        assert_same_weights(weights(whole), weights(resumed))


def test_head_start_follows_the_gradients_of_the_loss(tmp_path):
    config = manual("0:2", codec="fp32", head_start_epochs=2, head_start_lr=1e-2)
    without_steps = dict(config=config, learning_rate=0.0, num_train_epochs=1)
    ours = train(tmp_path / "ours", ZeroOrderTrainer, model=settle(tiny_vit()), zero_order=COPY, **without_steps)
    theirs = run(settle(tiny_vit()), pixel_dataset(rows=24), tmp_path / "theirs", **without_steps)
    assert_same_weights(weights(ours), weights(theirs))
    assert not torch.equal(weights(ours)["classifier.weight"], tiny_vit().state_dict()["classifier.weight"])


def test_rehearsal_sees_a_loss_that_reads_samples(tmp_path):
    """It compares what the zeroth-order step makes of samples and of features, and leaves the weights alone."""

    class ReadsSamples(ZeroOrderTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss + inputs["pixel_values"].float().mean()

    model = tiny_vit()
    before = weights_of(model)
    with pytest.raises(ValueError, match="fails with"):
        train(tmp_path, ReadsSamples, model=model, config=manual("0:2", codec="fp32"))
    assert all(torch.equal(value, before[name]) for name, value in weights_of(model).items())


def test_rehearsal_compares_estimates(tmp_path, monkeypatch):
    from hf_freezecache.training import rehearsal

    outcomes = []
    compare = rehearsal.find_difference
    monkeypatch.setattr(
        rehearsal, "find_difference", lambda *args, **kwargs: outcomes.append(args) or compare(*args, **kwargs)
    )
    train(tmp_path, ZeroOrderTrainer, config=manual("0:2", codec="fp32"), num_train_epochs=1)
    whole, replayed = outcomes[0][:2]
    assert whole.gradients.keys() == replayed.gradients.keys() and "classifier.weight" in whole.gradients
    assert not any("embeddings" in name for name in whole.gradients)


def test_adapters_alone_are_trained(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_vit()
    torch.manual_seed(0)
    model = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    )
    before = weights_of(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    trainer = train(tmp_path, ZeroOrderTrainer, model=model, config=manual("1:2", codec="fp32"), learning_rate=1e-2)
    assert trainer.freeze_status().replaying
    changed = {name for name, value in weights_of(model).items() if not torch.equal(value, before[name])}
    assert changed and all(flags[name] for name in changed)
    assert any("lora_" in name for name in changed)
