"""A head start learns from the samples that the training draws, as often as it draws them, and from no others."""

import itertools
import math

import pytest
import torch
from support.helpers import assert_same_weights, losses, messages, pixel_dataset, run, tiny_vit
from support.pretrained import settle
from test_head_start import AtFirstStep, config, pretrained, started
from torch.utils.data import BatchSampler, DataLoader, SubsetRandomSampler, WeightedRandomSampler
from transformers import Trainer

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer
from hf_freezecache.policies.auto import AutoPolicy
from hf_freezecache.training.drawn_rows import SamplerError, ask_sampler


def poisoned():
    """Labels are wrong from row 32 on."""

    def change(row, number):
        return {"labels": int(row["labels"]) if number < 32 else (int(row["labels"]) + 1) % 5}

    return pixel_dataset(64).map(change, with_indices=True).with_format("torch")


class Half(FreezeCacheTrainer):
    def _get_train_sampler(self, *args, **kwargs):
        return SubsetRandomSampler(range(32))


class HalfByWeight(FreezeCacheTrainer):
    def _get_train_sampler(self, *args, **kwargs):
        return WeightedRandomSampler([1.0] * 32 + [0.0] * 32, 40)


class HalfInOwnLoader(FreezeCacheTrainer):
    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        batches = BatchSampler(SubsetRandomSampler(range(32)), 8, drop_last=True)
        return DataLoader(loader.dataset, batch_sampler=batches, collate_fn=loader.collate_fn)


@pytest.mark.parametrize("trainer_class", [Half, HalfByWeight, HalfInOwnLoader])
def test_samples_that_the_sampler_never_draws_teach_the_head_nothing(trainer_class, tmp_path):
    found = []
    for number, data in enumerate((pixel_dataset(64), poisoned())):
        seen = AtFirstStep()
        trainer = run(
            pretrained(), data, tmp_path / str(number), config(), trainer_class=trainer_class, callbacks=[seen]
        )
        assert trainer.freeze_cache_report().phases[0].mode == "head_start"
        found.append(seen.weights)
    assert_same_weights(*found)


def test_a_trial_neither_learns_from_nor_looks_at_them(tmp_path):
    class Remembering(AutoPolicy):
        def take_trial(self, trial, num_blocks):
            trials.append(trial)
            return super().take_trial(trial, num_blocks)

    trials = []
    for number, data in enumerate((pixel_dataset(64), poisoned())):
        settings = FreezeCacheConfig(cache="never")
        more = {"policy": Remembering(max_frozen=0.75), "trainer_class": Half, "num_train_epochs": 10}
        run(pretrained(), data, tmp_path / str(number), settings, per_device_train_batch_size=2, **more)
    assert trials[0] is not None and trials[0] == trials[1]


def loader_of(sampler):
    return DataLoader(range(10), sampler=sampler)


def test_rows_are_as_often_there_as_they_are_drawn_and_no_generator_moves():
    torch.manual_seed(3)
    sampler = WeightedRandomSampler([0.0, 1.0, 1000.0] + [0.0] * 7, 500)
    before = torch.get_rng_state()
    found = ask_sampler(loader_of(sampler), 10)
    assert torch.equal(torch.get_rng_state(), before)
    assert found == list(sampler) and set(found) <= {1, 2} and found.count(2) > 400


class Moving:
    """Begins elsewhere in every epoch."""

    def __init__(self):
        self.epoch, self.generator = 0, torch.Generator()

    def __len__(self):
        return 4

    def __iter__(self):
        self.epoch += 1
        drawn = torch.randint(10, (1,), generator=self.generator).item()
        return iter([self.epoch, drawn, 0, 1])


def test_a_sampler_with_a_state_goes_on_from_where_it_was():
    asked, other = Moving(), Moving()
    assert ask_sampler(loader_of(asked), 10) == list(other)
    assert (asked.epoch, other.epoch) == (0, 1)
    assert list(asked) == list(Moving())


class Endless(Moving):
    def __init__(self):
        super().__init__()
        self.rows = itertools.cycle(range(5))

    def __iter__(self):
        return itertools.islice(self.rows, 4)


class Without(Moving):
    __len__ = None


class Elsewhere(Moving):
    def __iter__(self):
        return iter([0, 10])


class Named(Moving):
    def __iter__(self):
        return iter(["first", "second"])


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        (Endless(), "Endless has a state that cannot be put back"),
        (Without(), "Without has no length"),
        (Elsewhere(), "Elsewhere draws other rows than those of the data set"),
        (Named(), "Named draws something else than numbers of rows"),
    ],
)
def test_of_other_samplers_it_is_said_why_not(sampler, words):
    with pytest.raises(SamplerError, match=words):
        ask_sampler(loader_of(sampler), 10)


class Cycling(FreezeCacheTrainer):
    def _get_train_sampler(self, *args, **kwargs):
        return Endless()


class PlainCycling(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return Endless()


def test_where_it_cannot_be_told_there_is_none_and_the_training_is_that_of_trainer(tmp_path, caplog):
    data = pixel_dataset(16)
    plain = run(pretrained(), data, tmp_path / "plain", trainer_class=PlainCycling, num_train_epochs=1)
    trainer = run(pretrained(), data, tmp_path / "cycling", None, trainer_class=Cycling, num_train_epochs=1)
    assert losses(trainer) == losses(plain)
    assert "does not learn alone before the training: Endless has a state" in messages(caplog)


def test_one_that_was_asked_for_is_an_error_then(tmp_path):
    with pytest.raises(SamplerError, match="Endless has a state that cannot be put back"):
        run(pretrained(), pixel_dataset(16), tmp_path, config(), trainer_class=Cycling)


@pytest.mark.parametrize("batch_size", [5, 8])
def test_a_loss_of_the_users_gets_the_form_of_labels_that_mixup_gives(batch_size, tmp_path):
    shapes = set()

    def loss(outputs, labels, num_items_in_batch=None):
        shapes.add((labels.dtype, *labels.shape))
        return -(labels * outputs["logits"].log_softmax(-1)).sum(-1).mean()

    settings = {"per_device_train_batch_size": batch_size, "dataloader_drop_last": True}
    trainer, _ = started(tmp_path, config(mixup_alpha=0.8), compute_loss_func=loss, **settings)
    assert trainer.freeze_cache_report().phases[0].mode == "head_start"
    assert {shape[0] for shape in shapes} == {torch.float32} and {shape[2] for shape in shapes} == {5}


@pytest.mark.parametrize(
    ("settings", "rows"), [(None, 4), (FreezeCacheConfig(head_start_epochs=2), 64)], ids=["default", "asked for"]
)
def test_a_part_of_an_epoch_does_not_wait_for_all_samples(settings, rows, tmp_path, caplog):
    trainer, _ = started(tmp_path, settings, max_steps=1, per_device_train_batch_size=4)
    assert f"trained alone on features of {rows} samples" in messages(caplog)
    begin, *_ = trainer.freeze_cache_report().phases
    assert begin.mode == "head_start" and begin.steps >= 2 * math.ceil(rows / 4)


def test_where_no_new_head_is_found_a_head_start_that_was_asked_for_says_so(tmp_path, caplog):
    started(tmp_path, config(), settle(tiny_vit(), head="none"))
    assert "No head start: nothing behind the last block is known to have the weights" in messages(caplog)
