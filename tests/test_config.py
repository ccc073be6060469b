"""The settings: what is possible, what is refused, and the command line."""

import dataclasses
import sys

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_freezecache import FreezeCacheConfig
from hf_freezecache.training.settings import read_settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "sometimes"}, "policy='sometimes'.*none, manual, linear"),
        ({"cache": "maybe"}, "cache='maybe'.*auto, always, never"),
        ({"codec": "int5"}, "unknown codec 'int5'.*int4"),
        ({"policy": "manual"}, "freeze_points='1:4,3:8'"),
        ({"policy": "manual", "freeze_points": "1-4"}, "'1-4'"),
        ({"policy": "manual", "freeze_points": ""}, "freeze point"),
        ({"freeze_points": "1:4"}, "policy='manual' only"),
        ({"freeze_start": -0.1}, "freeze_start"),
        ({"freeze_end": 1.5}, "freeze_end"),
        ({"max_frozen": 2}, "max_frozen"),
        ({"max_frozen": float("nan")}, "max_frozen"),
        ({"freeze_start": 0.6, "freeze_end": 0.5}, "freeze_start=0.6 is after freeze_end=0.5"),
        ({"freeze_stages": 0}, "freeze_stages"),
        ({"views": -1}, "views=-1"),
        ({"views": 0.5}, "views=0.5"),
        ({"sensitive_fraction": 1.2}, "sensitive_fraction=1.2"),
        ({"sensitive_budget": "many"}, "sensitive_budget: 'many'.*2GB"),
        ({"similarity": "psnr"}, "similarity='psnr'.*ssim, cosine"),
        ({"sensitivity_batches": 0}, "sensitivity_batches=0"),
        ({"feature_noise": -0.1}, "feature_noise=-0.1"),
        ({"mixup_alpha": float("nan")}, "mixup_alpha=nan"),
        ({"cutmix_alpha": float("inf")}, "cutmix_alpha=inf"),
        ({"anneal": "linear"}, "anneal='linear'.*none, cosine"),
        ({"anneal_epochs": 2}, "with anneal='cosine' only"),
        ({"anneal_scale": True}, "with anneal='cosine' only"),
        ({"anneal": "cosine", "anneal_epochs": -1}, "anneal_epochs=-1"),
        ({"anneal": "cosine", "anneal_epochs": True}, "anneal_epochs=True"),
        ({"layer_decay": 0.0}, "layer_decay=0.0"),
        ({"layer_decay": 1.1}, "layer_decay=1.1"),
        ({"layer_decay": float("nan")}, "layer_decay=nan"),
        ({"layer_decay": 0.5, "layer_decay_min": 1.0}, "layer_decay_min=1.0"),
        ({"layer_decay_min": 0.1}, "set layer_decay below 1"),
        ({"cache_scope": "rack"}, "cache_scope='rack'.*shared, node"),
        ({"cache_scope": "node", "materialize": "write_through"}, "materialize='write_through' does not go with"),
        ({"cache_scope": "node", "deepen": "cache"}, "deepen='cache' does not go with"),
        ({"cache_scope": "node", "share_store": True}, "share_store=True does not go with"),
        ({"cache_scope": "node", "cache_eval": True}, "cache_eval=True does not go with"),
        ({"feature_cache_dir": "nothing://place"}, "fsspec does not know nothing://"),
    ],
)
def test_impossible_setting_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        FreezeCacheConfig(**settings)


def test_defaults_are_the_documented_ones():
    config = FreezeCacheConfig()
    expected = dict(policy="linear", freeze_points=None, freeze_start=0.25, freeze_end=0.5, max_frozen=0.75)
    expected |= dict(freeze_stages=2, blocks=None, cache="auto", feature_cache_dir=None, codec="int4", views=1)
    expected |= dict(sensitive_fraction=0.25, sensitive_budget=None, similarity="ssim", feature_noise=0.0)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("settings", "deepest"),
    [({"policy": "smartfrz"}, 1.0), ({"policy": "egeria", "max_frozen": 0.75}, 0.75), ({"policy": "auto"}, 0.75)],
)
def test_rules_that_look_have_no_limit_but_the_given_one(settings, deepest):
    config = FreezeCacheConfig(**settings)
    assert config.max_frozen == deepest
    assert ("max_frozen" in config.changed()) == ("max_frozen" in settings)


@pytest.mark.parametrize(("before", "deepest"), [({}, 1.0), ({"max_frozen": 0.5}, 0.5), ({"policy": "egeria"}, 1.0)])
def test_another_policy_has_its_own_limit(before, deepest):
    settings, policy = read_settings(FreezeCacheConfig(**before), "simfreeze")
    assert settings.max_frozen == policy.max_frozen == deepest
    assert read_settings(settings, "linear")[1].max_frozen == (0.75 if deepest == 1.0 else deepest)


def test_annealing_needs_a_freeze():
    with pytest.raises(ValueError, match="policy='none' freezes none"):
        read_settings({"policy": "none", "anneal": "cosine"}, None)
    with pytest.raises(ValueError, match="policy='none' freezes none"):
        read_settings({"anneal": "cosine"}, "none")


@pytest.mark.parametrize(("minimum", "cut"), [(0.0, 0), (0.0625, 0), (0.07, 1), (0.25, 2), (0.3, 3), (0.9, 4)])
def test_blocks_below_the_smallest_factor_are_frozen_from_the_start(minimum, cut):
    """Of 4 blocks with the factors 1/16, 1/8, 1/4 and 1/2."""
    settings, policy = read_settings({"policy": "none", "layer_decay": 0.5, "layer_decay_min": minimum}, None)
    assert settings.cut_at_start(4) == cut
    assert policy.changes(4, 3) == ([(0, cut)] if cut else [])


def test_every_setting_has_a_help_text():
    for field in dataclasses.fields(FreezeCacheConfig):
        assert len(field.metadata["help"]) > 10, field.name


def test_argument_parser_takes_it_beside_training_arguments(tmp_path):
    parser = HfArgumentParser((TrainingArguments, FreezeCacheConfig))
    args, config = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--policy", "manual", "--freeze_points", "1:4,0.5:8", "--codec", "int8"]
        + ["--blocks", "stem", "layer.0", "--cache", "never", "--num_train_epochs", "2"]
    )
    assert args.num_train_epochs == 2
    assert config == FreezeCacheConfig(
        policy="manual", freeze_points="1:4,0.5:8", codec="int8", blocks=["stem", "layer.0"], cache="never"
    )
    _, defaults = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path)])
    assert defaults == FreezeCacheConfig()


def test_argument_parser_prints_help(tmp_path, monkeypatch, capsys):
    """argparse formats help texts with `%`: a stray one breaks `--help`."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        HfArgumentParser((TrainingArguments, FreezeCacheConfig)).parse_args_into_dataclasses()
    assert caught.value.code == 0
    assert "--freeze_points" in capsys.readouterr().out


def test_config_prefers_the_progression():
    config = FreezeCacheConfig(codec="fp32", progressive="0.5:int4,0.8:int2")
    assert [config.codec_at(cut, 10) for cut in (1, 5, 8)] == ["int4", "int4", "int2"]
    assert FreezeCacheConfig(codec="fp32").codec_at(3, 10) == "fp32"


@pytest.mark.parametrize("policy", ["linear", "simfreeze", "auto"])
def test_predictors_are_for_smartfrz_alone(policy):
    with pytest.raises(ValueError, match="predictor is read by policy='smartfrz' only"):
        FreezeCacheConfig(policy=policy, predictor="some/where")


def test_freezeout_may_begin_after_the_last_stage_of_linear():
    assert FreezeCacheConfig(policy="freezeout", freeze_start=0.8).freeze_end == 0.5
    with pytest.raises(ValueError, match="is after freeze_end"):
        FreezeCacheConfig(policy="linear", freeze_start=0.8)
