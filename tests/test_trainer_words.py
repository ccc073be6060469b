"""What a user reads at the default log level, and what a wrong argument is answered with."""

import logging

import pytest
import torch
from support.helpers import losses, make_args, manual, messages, pixel_dataset, run, tiny_vit
from support.policies import Answers
from support.pretrained import settle
from support.trainer_data import image_dataset, to_pixels

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer, FreezePolicy
from hf_freezecache.policies import LinearPolicy, ManualPolicy


def lines(caplog, words):
    return [record.message for record in caplog.records if words in record.message]


@pytest.fixture(autouse=True)
def at_warning(caplog):
    caplog.set_level("WARNING")


def test_freezing_is_announced_once_a_run_before_its_first_step(tmp_path, caplog):
    trainer = run(tiny_vit(), pixel_dataset(), tmp_path, manual("1:2,2:3,4:4", codec="fp32"))
    [line] = lines(caplog, "blocks are frozen")
    assert line.startswith(
        "From epoch 1, 2 of 4 blocks are frozen, from epoch 2, 3 of 4: policy manual; policy='none'"
    )
    assert "cut 4 in epoch 4" in line  # there is no epoch 4
    caplog.clear()
    trainer.train()
    assert len(lines(caplog, "blocks are frozen")) == 1
    assert len(lines(caplog, "Reusing the feature store")) + len(lines(caplog, "Built the feature store")) == 2


def test_default_that_freezes_nothing_says_so(tmp_path, caplog):
    run(settle(tiny_vit()), pixel_dataset(), tmp_path, num_train_epochs=1)
    assert "Nothing will be frozen in this training of 1 epoch (linear, freeze_start=0.25" in messages(caplog)


def test_rule_of_the_users_is_announced_when_it_freezes(tmp_path, caplog):
    run(tiny_vit(), pixel_dataset(), tmp_path, FreezeCacheConfig(cache="never"), policy=Answers(0, 2, 2, 3))
    assert [line[:13] for line in lines(caplog, "blocks are frozen")] == ["From epoch 1,"]


def test_other_freeze_points_than_the_checkpoints_are_said(tmp_path, caplog):
    run(tiny_vit(), pixel_dataset(), tmp_path, manual("1:2"), save_strategy="epoch")
    for points, told in (("1:2", False), ("1:3", True)):
        caplog.clear()
        run(tiny_vit(), pixel_dataset(), tmp_path, manual(points), resume=str(tmp_path / "checkpoint-12"))
        assert bool(lines(caplog, "another rule (manual, freeze_points='1:2')")) == told


def test_declined_build_names_its_numbers_and_is_no_build(tmp_path, caplog):
    config = FreezeCacheConfig(policy="manual", freeze_points="3:2")
    trainer = run(tiny_vit(), pixel_dataset(), tmp_path, config)
    [line] = lines(caplog, "No feature store for cut 2")
    assert "over the data" in line and "1 epoch left" in line
    report = trainer.freeze_cache_report()
    assert report.totals.build_seconds == 0 and "build" not in {phase.mode for phase in report.phases}


def test_messages_are_not_glued_to_a_bar(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_freezecache"), "handlers", [logging.StreamHandler()])
    run(tiny_vit(), pixel_dataset(), tmp_path, manual("1:2"), disable_tqdm=False, logging_strategy="no")
    shown = capfd.readouterr().err
    assert "%|" in shown  # there was a bar
    for words in ("From epoch 1", "Built the feature store"):
        before = shown[: shown.index(words)]
        # The bar's line is wiped: what stands before the message on its line are blanks.
        assert before.rpartition("\n")[2].rpartition("\r")[2].strip() == "", before[-80:]


def test_column_that_a_transform_misses_is_explained(tmp_path, caplog):
    dataset = image_dataset().with_transform(to_pixels)
    with pytest.raises(ValueError, match="reads the column 'image'.*remove_unused_columns=False"):
        run(tiny_vit(), dataset, tmp_path, manual("1:2"))
    with pytest.raises(KeyError):
        run(settle(tiny_vit()), dataset, tmp_path)
    assert "remove_unused_columns=False" in messages(caplog)


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        return {"input_ids": torch.arange(4 + index // 8), "labels": index % 2}


def test_texts_of_which_a_batch_has_one_length_need_no_padding(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=16)
    blocks = ["bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1"]
    trainings = {}
    for cache in ("never", "always"):
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(**sizes))
        config = manual("0:2", blocks=blocks, cache=cache, codec="fp32")
        trainings[cache] = run(model, Texts(), tmp_path / cache, config, train_sampling_strategy="sequential")
    assert trainings["always"].freeze_status().replaying
    assert losses(trainings["always"]) == losses(trainings["never"])


# Wrong types


def make(tmp_path, **settings):
    return FreezeCacheTrainer(model=tiny_vit(), args=make_args(tmp_path), **settings)


def test_name_of_a_policy_does_for_the_policy(tmp_path):
    assert isinstance(make(tmp_path, policy="linear")._freeze_policy, LinearPolicy)
    assert not make(tmp_path, policy="none")._is_active
    config = FreezeCacheConfig(policy="manual", freeze_points="1:2")
    assert isinstance(make(tmp_path, policy="manual", freeze_cache=config)._freeze_policy, ManualPolicy)
    assert not make(tmp_path, policy="none", freeze_cache=config)._is_active


def test_dict_does_for_the_settings(tmp_path):
    trainer = make(tmp_path, freeze_cache={"policy": "manual", "freeze_points": [(1, 2), (3, 3)]})
    assert trainer._freeze_config == FreezeCacheConfig(policy="manual", freeze_points="1:2,3:3")
    trainer = make(tmp_path, freeze_cache={"freeze_points": "1:2"}, policy="manual")
    assert trainer._freeze_config.policy == "manual"


@pytest.mark.parametrize("points", ["1:4,3:8", ["1:4", "3:8"], [(1, 4), (3, 8)], {1: 4, 3: 8}, [[1, 4], "3:8"]])
def test_freeze_points_are_taken_in_every_form(points):
    assert FreezeCacheConfig(policy="manual", freeze_points=points).freeze_points == "1:4,3:8"
    assert ManualPolicy(points).text == "1:4,3:8"


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"policy": "manual"}, ValueError, "needs freeze_points"),
        ({"policy": "manually"}, ValueError, "possible are none, manual, linear"),
        ({"policy": LinearPolicy}, TypeError, "an object of a class derived from FreezePolicy"),
        ({"policy": 3}, TypeError, "none, manual, linear"),
        ({"freeze_cache": "linear"}, TypeError, "pass a FreezeCacheConfig"),
        ({"freeze_cache": {"points": "1:2"}}, ValueError, "unknown points; the settings are policy, freeze_points"),
        ({"freeze_cache": {"policy": "manual", "freeze_points": [1, 2]}}, TypeError, "epoch:cut pairs"),
        ({"freeze_cache": {"policy": "manual", "freeze_points": 4}}, TypeError, "epoch:cut pairs"),
        ({"freeze_cache": {"policy": "manual", "freeze_points": "1:0"}}, ValueError, "freezes nothing"),
        ({"freeze_cache": {"freeze_start": "early"}}, ValueError, "is a fraction"),
        ({"freeze_cache": {"freeze_stages": 1.5}}, ValueError, "an integer"),
    ],
)
def test_wrong_argument_is_answered_with_the_right_one(settings, error, words, tmp_path):
    with pytest.raises(error, match=words):
        make(tmp_path, **settings)


def test_policy_of_the_users_needs_no_new_methods():
    class Mine(FreezePolicy):
        def decide(self, moment):
            return 0

    assert Mine().changes(4, 4) is None and Mine().describe() == "Mine"
