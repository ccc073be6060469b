"""FSDP2 in two processes (gloo, CPU): blocks freeze and are replayed; what needs the whole model is refused."""

import pytest
from script_settings import train
from support.launching import launch
from support.together import SCRIPT, close, given, same, train_together

SLOW = pytest.mark.slow
LAYERS = {"transformer_layer_cls_to_wrap": ["ViTLayer"]}
FSDP2 = {"fsdp": "full_shard", "fsdp_config": {"version": 2, **LAYERS}}
#: Stores whose features are those of the blocks, bit for bit; anything that is not as it should be is an error.
EXACT = {"codec": "fp32", "cache": "always", "on_mismatch": "error"}


def settings(processes, sharding=FSDP2, points="1:3", **more):
    arguments = {"per_device_train_batch_size": 8 // processes, "eval_strategy": "epoch", **sharding}
    config = {"points": points, "cache": "never", **more.pop("config", {})}
    config = {name: value for name, value in config.items() if value is not None}
    return {"config": config, "arguments": {**arguments, **more.pop("arguments", {})}, **more}


def alone(output, **more):
    output.mkdir(exist_ok=True)
    seen, weights = train(output, settings(1, {}, **more))
    return [seen], weights


@SLOW
@pytest.mark.parametrize("points", ["1:3", "0:2,2:3"])
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


def test_replay_of_a_sharded_model_is_that_of_a_whole_one(tmp_path):
    sharded = train_together(tmp_path / "sharded", settings(2, config=EXACT))
    assert close(sharded, alone(tmp_path / "whole", config=EXACT))
    for seen in sharded[0]:
        assert seen["replaying"] and seen["operations"][-1] == seen["operations"][6] < seen["operations"][5]


@SLOW
@pytest.mark.parametrize(
    ("points", "arguments"),
    [
        ("1:3", {}),
        ("0:2,2:3", {}),
        ("1:3", {"bf16": True}),
        ("1:3", {"gradient_accumulation_steps": 2}),
    ],
)
def test_replay_is_freezing_alone_bit_for_bit_and_gathers_no_frozen_block(points, arguments, tmp_path):
    frozen = train_together(tmp_path / "frozen", settings(2, points=points, arguments=arguments))
    cached = train_together(tmp_path / "cached", settings(2, points=points, arguments=arguments, config=EXACT))
    assert same(cached, frozen)
    for seen, other in zip(cached[0], frozen[0], strict=True):
        assert seen["cut"] == 3 and seen["replaying"] and seen["modes"].count("build") == len(points.split(","))
        assert seen["evaluations"] == other["evaluations"]
        # Embeddings and two layers are not gathered, and no layer ahead of its backward pass; one operation tells that
        # all is well.
        batches = arguments.get("gradient_accumulation_steps", 1)
        assert seen["operations"][-1] == other["operations"][-1] - (4 - 1) * batches


@SLOW
@pytest.mark.parametrize("config", [{}, EXACT], ids=["frozen", "cached"])
def test_a_head_start_is_that_of_a_whole_model(config, tmp_path):
    more = {"points": "0:3", "config": {**config, "head_start_epochs": 1}}
    sharded = train_together(tmp_path / "sharded", settings(2, **more))
    whole = train_together(tmp_path / "whole", settings(2, {}, **more))
    assert close(sharded, whole)
    for seen in sharded[0]:
        assert "head_start" in seen["modes"] and seen["replaying"] == bool(config)
    cold = train_together(tmp_path / "cold", settings(2, points="0:3", config={"head_start_epochs": 0}))
    assert cold[0][0]["losses"][0] > sharded[0][0]["losses"][0]


@SLOW
def test_a_head_start_of_half_precision_learns_in_single_precision(tmp_path):
    more = {"points": "0:3", "config": {"head_start_epochs": 2}}
    half = train_together(tmp_path / "half", settings(2, arguments={"bf16": True}, **more))
    single = train_together(tmp_path / "single", settings(2, **more))
    assert half[0][0]["losses"] == pytest.approx(single[0][0]["losses"], abs=0.05)


@SLOW
def test_texts_of_many_lengths_are_replayed_as_they_are_frozen(tmp_path):
    sharding = {"fsdp": "full_shard", "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]}}
    frozen = train_together(tmp_path / "frozen", settings(2, sharding, model="bert"))
    cached = train_together(tmp_path / "cached", settings(2, sharding, model="bert", config=EXACT))
    assert same(cached, frozen) and cached[0][0]["replaying"]


@SLOW
def test_a_frozen_module_of_which_a_part_runs_on_is_gathered(tmp_path):
    sharding = {"fsdp": "full_shard", "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["_Layer"]}}
    frozen = train_together(tmp_path / "frozen", settings(2, sharding, model="shares positions"))
    cached = train_together(tmp_path / "cached", settings(2, sharding, model="shares positions", config=EXACT))
    assert same(cached, frozen) and cached[0][0]["replaying"]


@SLOW
def test_samples_of_many_sizes_are_frozen_and_not_cached(tmp_path):
    """A step of one process might have to run frozen blocks to learn how large the features of a size are."""
    arguments = {"per_device_train_batch_size": 1, "remove_unused_columns": False, "eval_strategy": "no"}
    arguments["num_train_epochs"] = 2
    more = {"model": "vit of sizes", "rows": 24, "arguments": arguments, "points": "0:3"}
    frozen = train_together(tmp_path / "frozen", settings(2, **more))
    cached = train_together(tmp_path / "cached", settings(2, config={"cache": "always", "codec": "fp32"}, **more))
    assert same(cached, frozen)
    assert cached[0][0]["cut"] == 3 and not cached[0][0]["replaying"]


@SLOW
def test_a_store_of_a_sharded_model_is_that_of_a_whole_one(tmp_path):
    """The weights are the same at the first epoch, so that a single process finds what two have stored."""
    more = {"points": "0:3", "config": {**EXACT, "feature_cache_dir": str(tmp_path / "stores")}}
    sharded = train_together(tmp_path / "sharded", settings(2, **more))
    whole = alone(tmp_path / "whole", **more)
    assert sharded[0][0]["built"] == 1 and whole[0][0]["built"] == 0 and whole[0][0]["replaying"]
    assert close(sharded, whole)


@SLOW
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
@pytest.mark.parametrize("config", [{}, EXACT], ids=["frozen", "cached"])
def test_sharded_training_that_is_resumed_is_the_uninterrupted_one(config, kind, tmp_path):
    """On a resume, blocks freeze before the model is sharded."""
    sharding = {**FSDP2, "fsdp_config": {**FSDP2["fsdp_config"], "state_dict_type": kind}}
    more = {"arguments": {"save_strategy": "epoch"}, "config": config}
    whole = train_together(tmp_path / "whole", settings(2, sharding, **more))
    train_together(tmp_path / "parts", settings(2, sharding, stop_after=15, **more))
    parts = train_together(tmp_path / "parts", settings(2, sharding, resume=True, **more))
    assert close(whole, parts) and parts[0][0]["cut"] == 3 and parts[0][0]["replaying"] == bool(config)
    assert parts[0][0]["optimizer_states"] == whole[0][0]["optimizer_states"]


@SLOW
@pytest.mark.parametrize("rank", [0, 1])
def test_a_store_that_one_process_cannot_read_any_more_is_left_by_all(rank, tmp_path):
    """A process that ran frozen blocks alone would wait for the others for ever."""
    trouble = {"kind": "loses", "rank": rank, "step": 8}
    frozen = train_together(tmp_path / "frozen", settings(2))
    cached = train_together(tmp_path / "cached", settings(2, config=EXACT, trouble=trouble))
    assert same(cached, frozen)
    for seen in cached[0]:
        assert [mode for mode in seen["modes"] if mode != "eval"] == ["live", "build", "replay", "live"]
        assert seen["replaying"]  # in the next epoch it can be read again


@SLOW
def test_frozen_weights_that_change_in_one_process_end_the_replay_in_all(tmp_path):
    trouble = {"kind": "changes", "rank": 0, "step": 8}  # the second one holds no value of this parameter
    cached = train_together(tmp_path, settings(2, config={**EXACT, "on_mismatch": "fallback"}, trouble=trouble))
    for seen in cached[0]:
        assert [mode for mode in seen["modes"] if mode != "eval"] == ["live", "build", "replay", "live"]
        assert seen["steps"] == 24 and not seen["replaying"]


@SLOW
def test_a_step_on_features_that_needs_samples_is_an_error_in_words(tmp_path):
    given_settings = settings(2, config=EXACT, trouble={"kind": "peeks", "rank": 1, "step": 8})
    log = launch(given(tmp_path, given_settings), script=SCRIPT, fails=True)
    assert "This step cannot be run again on samples: FSDP2 has begun it" in log


@pytest.mark.parametrize(
    ("sharding", "config", "words"),
    [
        pytest.param(
            {"fsdp_config": {"version": 2, "cpu_ram_efficient_loading": True, **LAYERS}},
            {},
            "cpu_ram_efficient_loading=False",
            marks=SLOW,
        ),
        ({}, {"cache_eval": True, "anneal": "cosine"}, "cache_eval=True, anneal='cosine' would need"),
        pytest.param({}, {"materialize": "write_through"}, "materialize='write_through' would need", marks=SLOW),
        pytest.param(
            {"fsdp_config": {"version": 2, "activation_checkpointing": True, **LAYERS}},
            {},
            "activation checkpointing of its own",
            marks=SLOW,
        ),
        pytest.param({"torch_compile": True}, {}, "FSDP2 with torch_compile", marks=SLOW),
        pytest.param({}, {"policy": "simfreeze", "points": None}, "which looks at the training", marks=SLOW),
        pytest.param({}, {"policy": "auto", "points": None}, "which tries freezing", marks=SLOW),
    ],
)
def test_what_needs_a_whole_model_is_refused_before_the_training(sharding, config, words, tmp_path):
    log = launch(given(tmp_path, settings(2, {**FSDP2, **sharding}, config=config)), script=SCRIPT, fails=True)
    assert words in log


@SLOW
@pytest.mark.parametrize("policy", ["linear", "freezeout"])
def test_schedules_of_policies_freeze_and_replay_as_in_a_whole_model(policy, tmp_path):
    config = {**EXACT, "policy": policy, "points": None, "head_start_epochs": 0}
    sharded = train_together(tmp_path / "sharded", settings(2, config=config))
    assert close(sharded, alone(tmp_path / "whole", config=config))
    assert all(seen["cut"] == 3 and seen["built"] for seen in sharded[0])


@SLOW
def test_a_second_training_of_a_model_in_shards_is_refused(tmp_path):
    log = launch(given(tmp_path, settings(2, again=True)), script=SCRIPT, fails=True)
    assert "give each training a new model and a new trainer" in log


@SLOW
def test_defaults_under_fsdp_freeze(tmp_path):
    """FSDP1, which is refused, does not run on CPUs: see `test_trainer_sharding`."""
    log = launch(given(tmp_path / "defaults", {**settings(2), "config": None}), script=SCRIPT)
    assert "of 4 blocks are frozen" in log and "this is plain training" not in log
