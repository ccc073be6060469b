"""FSDP2 in two processes (gloo, CPU): blocks freeze, nothing is cached; what needs a whole model is refused."""

import pytest
from script_settings import train
from support.launching import launch
from support.together import SCRIPT, close, given, train_together

SLOW = pytest.mark.slow
LAYERS = {"transformer_layer_cls_to_wrap": ["ViTLayer"]}
FSDP2 = {"fsdp": "full_shard", "fsdp_config": {"version": 2, **LAYERS}}


def settings(processes, sharding=FSDP2, points="1:3", **more):
    arguments = {"per_device_train_batch_size": 8 // processes, "eval_strategy": "epoch", **sharding}
    config = {"points": points, "cache": "never", **more.pop("config", {})}
    config = {name: value for name, value in config.items() if value is not None}
    return {"config": config, "arguments": {**arguments, **more.pop("arguments", {})}, **more}


def alone(output, **more):
    output.mkdir()
    seen, weights = train(output, settings(1, {}, **more))
    return [seen], weights


@pytest.mark.parametrize("points", ["1:3", pytest.param("0:2,2:3", marks=SLOW)])
def test_blocks_that_freeze_in_a_sharded_model_freeze_as_in_a_whole_one(points, tmp_path):
    """Before it is sharded (epoch 0 begins after it was, a resume before), and after an evaluation has gathered it."""
    sharded = train_together(tmp_path / "sharded", settings(2, points=points))
    whole = alone(tmp_path / "whole", points=points)
    assert close(sharded, whole)
    for seen in sharded[0]:
        assert seen["cut"] == 3 and not seen["replaying"]
        assert seen["evaluations"] == pytest.approx(whole[0][0]["evaluations"], abs=1e-5)
        assert seen["optimizer_states"] == whole[0][0]["optimizer_states"]  # those of frozen parameters are gone
    assert whole[0][0]["optimizer_states"] < 30


@SLOW
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_sharded_training_that_is_resumed_is_the_uninterrupted_one(kind, tmp_path):
    """On a resume, blocks freeze before the model is sharded."""
    sharding = {**FSDP2, "fsdp_config": {**FSDP2["fsdp_config"], "state_dict_type": kind}}
    more = {"arguments": {"save_strategy": "epoch"}}
    whole = train_together(tmp_path / "whole", settings(2, sharding, **more))
    train_together(tmp_path / "parts", settings(2, sharding, stop_after=15, **more))
    parts = train_together(tmp_path / "parts", settings(2, sharding, resume=True, **more))
    assert close(whole, parts) and parts[0][0]["cut"] == 3
    assert parts[0][0]["optimizer_states"] == whole[0][0]["optimizer_states"]


@pytest.mark.parametrize(
    ("sharding", "config", "words"),
    [
        pytest.param(
            {"fsdp_config": {"version": 2, "cpu_ram_efficient_loading": True, **LAYERS}},
            {},
            "cpu_ram_efficient_loading=False",
            marks=SLOW,
        ),
        ({}, {"cache": "always", "anneal": "cosine"}, "cache='always', anneal='cosine' would need"),
        pytest.param({}, {"policy": "simfreeze", "points": None}, "which looks at the training", marks=SLOW),
        pytest.param({}, {"policy": "auto", "points": None}, "which tries freezing", marks=SLOW),
    ],
)
def test_what_needs_a_whole_model_is_refused_before_the_training(sharding, config, words, tmp_path):
    log = launch(given(tmp_path, settings(2, {**FSDP2, **sharding}, config=config)), script=SCRIPT, fails=True)
    assert words in log


@SLOW
def test_defaults_under_fsdp_freeze_and_say_once_that_nothing_is_cached(tmp_path):
    """FSDP1, which is refused, does not run on CPUs: see `test_trainer_sharding`."""
    log = launch(given(tmp_path / "defaults", {**settings(2), "config": None}), script=SCRIPT)
    assert log.count("FSDP shards the frozen blocks") == 1
