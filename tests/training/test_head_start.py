"""A head start: what it trains, what it leaves alone, and when there is none."""

import copy
import logging

import pytest
import torch
from support.helpers import (
    assert_same_weights,
    losses,
    manual,
    messages,
    pixel_dataset,
    run,
    tiny_resnet,
    tiny_vit,
    weights,
)
from support.pretrained import settle
from support.sized_images import GroupingTrainer, SizedImages
from support.sounds import PadSounds, Sounds, wav2vec2, wav2vec2_of_letters
from support.token_rows import Pad, Texts, bert, xlnet
from transformers import TrainerCallback, default_data_collator

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer
from hf_freezecache.training import head_start
from hf_freezecache.training.budget import StoreBudget


def pretrained():
    return settle(tiny_vit())


def config(points="1:2", **settings):
    return manual(points, **{"codec": "fp32", "cache": "never", "head_start_epochs": 2, **settings})


class AtFirstStep(TrainerCallback):
    """Copies the weights that the first step begins with."""

    weights = None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.weights is None:
            self.weights = copy.deepcopy(model.state_dict())


def started(folder, settings, model=None, **more):
    seen = AtFirstStep()
    model = pretrained() if model is None else model
    trainer = run(model, pixel_dataset(64), folder, settings, callbacks=[seen], **more)
    return trainer, seen.weights


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_the_head_alone_is_trained_and_is_better(tmp_path):
    plain, before = started(tmp_path / "plain", config(head_start_epochs=0))
    trainer, after = started(tmp_path / "started", config())
    assert changed(before, after) == {"classifier.weight", "classifier.bias"}
    assert losses(trainer)[0] < losses(plain)[0]


@pytest.mark.parametrize("cache", ["never", "always"])
def test_the_training_behind_it_is_that_of_a_model_with_such_a_head(cache, tmp_path):
    """Nothing but the head's weights is left of it: no generator, no buffer, no state of the optimizer, no step."""
    trainer, after = started(tmp_path / "started", config(cache=cache))
    model = pretrained()
    model.load_state_dict(after)
    other, _ = started(tmp_path / "other", config(cache=cache, head_start_epochs=0), model)
    assert losses(trainer) == losses(other)
    assert_same_weights(weights(trainer), weights(other))
    assert trainer.state.global_step == other.state.global_step
    assert [entry.keys() for entry in trainer.state.log_history] == [entry.keys() for entry in other.state.log_history]


def test_without_freezing_it_is_a_plain_training_of_a_model_with_such_a_head(tmp_path):
    trainer, after = started(tmp_path / "started", FreezeCacheConfig(policy="none", head_start_epochs=2))
    assert trainer.freeze_cache_report().phases[0].mode == "head_start"
    model = pretrained()
    assert changed(model.state_dict(), after) == {"classifier.weight", "classifier.bias"}
    model.load_state_dict(after)
    other, _ = started(tmp_path / "other", FreezeCacheConfig(policy="none"), model)
    assert losses(trainer) == losses(other)
    assert_same_weights(weights(trainer), weights(other))


def test_what_it_cost_is_in_the_report(tmp_path):
    trainer, _ = started(tmp_path, config())
    report = trainer.freeze_cache_report()
    phase = report.phases[0]
    assert (phase.mode, phase.cut, phase.epochs) == ("head_start", 0, 2) and phase.steps >= 16 and phase.flops > 0
    assert report.totals.head_start_seconds == phase.seconds > 0
    assert report.totals.flops == sum(phase.flops for phase in report.phases)
    assert "head start" in str(report) and "head_start" in str(report)


@pytest.mark.parametrize(
    ("make", "settings", "is_started"),
    [
        (pretrained, {}, True),
        (tiny_vit, {}, False),  # nothing was trained: there is nothing to spare
        (lambda: settle(tiny_vit(), head="none"), {}, False),
        (lambda: settle(tiny_vit(), head="none"), {"head_start": "always"}, True),
        (pretrained, {"head_start_epochs": 0, "head_start": "always"}, False),
    ],
    ids=["new head", "untrained model", "trained head", "always", "off"],
)
def test_which_heads_get_one(make, settings, is_started, tmp_path):
    trainer, after = started(tmp_path, config(**settings), make())
    assert bool(changed(make().state_dict(), after)) == is_started
    assert ("head_start" in [phase.mode for phase in trainer.freeze_cache_report().phases]) == is_started


def test_texts_get_one(tmp_path):
    seen = AtFirstStep()
    model = settle(bert())
    before = copy.deepcopy(model.state_dict())
    settings = dict(data_collator=Pad(), remove_unused_columns=False, callbacks=[seen])
    trainer = run(model, Texts(32), tmp_path, config(head_start_epochs=8, head_start_lr=0.03), **settings)
    assert changed(before, seen.weights) == {"classifier.weight", "classifier.bias"}
    assert trainer.freeze_cache_report().phases[0].mode == "head_start"


def by_hand(model, data, collate, batches, head, epochs=2, rate=0.01):
    """Trains the head on batches of the whole model, everything else as it is."""
    model.eval()
    parameters = dict(getattr(model, head).named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * len(batches))
    for epoch in range(epochs):
        for number in torch.randperm(len(batches), generator=torch.Generator().manual_seed(epoch)).tolist():
            loss = model(**collate([data[row] for row in batches[number]])).loss
            gradients = torch.autograd.grad(loss, [*parameters.values()])
            for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
    return model.state_dict()


def of_one_size(rows, data, size):
    """Rows in batches of images of one size, in the order in which they are full."""
    found, waiting = [], {}
    for row in rows:
        waiting.setdefault(data.sizes[row], []).append(row)
        if len(waiting[data.sizes[row]]) == size:
            found.append(waiting.pop(data.sizes[row]))
    return found, waiting


@pytest.mark.parametrize(
    ("make", "data", "collate"),
    [
        (bert, Texts(30), Pad()),
        (xlnet, Texts(30), Pad()),
        (wav2vec2, Sounds(30), PadSounds()),
        (wav2vec2_of_letters, Sounds(30, letters=True), PadSounds()),
        (tiny_resnet, SizedImages(32), default_data_collator),
    ],
    ids=["texts", "texts whose padding counts", "sounds", "letters of sounds", "images of several sizes"],
)
def test_on_samples_of_several_widths_and_sizes_it_is_a_training_by_hand(make, data, collate, tmp_path):
    head = {xlnet: "logits_proj", wav2vec2_of_letters: "lm_head"}.get(make, "classifier")

    def settled():
        model = settle(make(), head)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(3)).tolist()
    batches, more = [order[first : first + 4] for first in range(0, len(data), 4)], {}
    if make is tiny_resnet:
        (batches, left), more = of_one_size(order, data, 4), {"trainer_class": GroupingTrainer}
        assert not left
    seen = AtFirstStep()
    settings = dict(data_collator=collate, remove_unused_columns=False, callbacks=[seen], num_train_epochs=1)
    run(settled(), data, tmp_path, config(head_start_lr=0.01), per_device_train_batch_size=4, **settings, **more)
    expected = by_hand(settled(), data, collate, batches, head)
    assert changed(settled().state_dict(), seen.weights) == {name for name in expected if name.startswith(head)}
    for name, value in seen.weights.items():
        assert torch.allclose(value, expected[name], atol=2e-5), name


def test_the_users_own_loss_trains_the_head(tmp_path):
    class OnlyFirstClass(FreezeCacheTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(pixel_values=inputs["pixel_values"])
            loss = -outputs.logits.log_softmax(-1)[:, 0].mean()
            return (loss, outputs) if return_outputs else loss

    _, after = started(tmp_path, config(head_start_lr=0.03), trainer_class=OnlyFirstClass)
    assert after["classifier.bias"].argmax() == 0 and after["classifier.bias"][0] > 0.05


def test_a_step_that_reads_what_is_before_the_head_is_an_error_before_the_first_step(tmp_path):
    class ReadsImages(FreezeCacheTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            return super().compute_loss(model, inputs) + inputs["pixel_values"].mean()

    seen = AtFirstStep()
    with pytest.raises(ValueError, match="is read"):
        run(pretrained(), pixel_dataset(), tmp_path, config(), trainer_class=ReadsImages, callbacks=[seen])
    assert seen.weights is None


@pytest.fixture
def little_memory(monkeypatch):
    """One batch of features fits into it."""
    monkeypatch.setattr(head_start, "_MOST_BYTES", 8 * 32 * 4)


@pytest.mark.parametrize("cache", ["never", "always"])
def test_features_that_do_not_fit_into_memory_give_the_same_head(cache, tmp_path, monkeypatch, caplog):
    settings = config(cache=cache, points="0:2")
    _, expected = started(tmp_path / "memory", settings)
    monkeypatch.setattr(head_start, "_MOST_BYTES", 8 * 32 * 4)
    _, found = started(tmp_path / "file", settings)
    assert_same_weights(found, expected)
    assert "The head start takes" not in messages(caplog)
    assert {path.name for path in (tmp_path / "file").rglob("*") if "_freeze_cache" in str(path)} == {
        path.name for path in (tmp_path / "memory").rglob("*") if "_freeze_cache" in str(path)
    }


@pytest.mark.usefixtures("little_memory")
def test_of_no_room_as_many_samples_as_fit_are_drawn_and_it_is_said(tmp_path, monkeypatch, caplog):
    """Three of eight batches: one in memory, two in the budget."""
    monkeypatch.setattr(StoreBudget, "room", lambda self: 2 * 8 * 32 * 4)
    caplog.set_level("INFO", logger="hf_freezecache")
    started(tmp_path, config())
    assert "The head start takes 24 of 64 samples" in caplog.text and "`cache_budget` are left" in caplog.text
    assert "on features of 24 samples" in caplog.text


@pytest.mark.usefixtures("little_memory")
def test_the_file_keeps_to_the_budget(tmp_path, caplog):
    started(tmp_path, config(cache_budget="1KB"))
    assert "The head start takes 8 of 64 samples" in caplog.text


@pytest.mark.usefixtures("little_memory")
def test_after_an_error_nothing_of_the_file_is_left(tmp_path):
    class Fails(FreezeCacheTrainer):
        def compute_loss(self, *args, **kwargs):
            raise ArithmeticError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        run(pretrained(), pixel_dataset(64), tmp_path, config(), trainer_class=Fails)
    assert not (tmp_path / "_freeze_cache").exists()


def test_a_head_that_gets_worse_keeps_its_weights(tmp_path, caplog):
    _, after = started(tmp_path, config(head_start_lr=1e4))
    assert not changed(pretrained().state_dict(), after)
    assert any("weights were put back" in record.message for record in caplog.records)


def test_of_one_batch_nothing_is_held_out(tmp_path, caplog):
    caplog.set_level("INFO", logger="hf_freezecache")
    logging.getLogger("hf_freezecache").propagate = True
    run(pretrained(), pixel_dataset(8), tmp_path, config(head_start_epochs=20))
    assert "on features of 8 samples, learning rate 0.001" in caplog.text


def test_resumed_trainings_get_none(tmp_path):
    settings = dict(save_strategy="epoch", num_train_epochs=3)
    whole, _ = started(tmp_path / "run", config(), **settings)
    seen = AtFirstStep()
    checkpoint = str(tmp_path / "run" / "checkpoint-8")
    resumed = run(
        pretrained(), pixel_dataset(64), tmp_path / "run", config(), resume=checkpoint, callbacks=[seen], **settings
    )
    assert_same_weights(weights(resumed), weights(whole))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"head_start_epochs": -1}, "number of epochs"),
        ({"head_start_epochs": True}, "number of epochs"),
        ({"head_start_lr": 0.0}, "more than 0"),
        ({"head_start": "old"}, "new, always"),
    ],
)
def test_settings_that_are_not_possible(settings, words):
    with pytest.raises(ValueError, match=words):
        FreezeCacheConfig(**settings)
