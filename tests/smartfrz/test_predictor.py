"""Attention over the history of a block."""

import json

import pytest
import torch
from support.recorded_runs import made_up_run

from hf_freezecache.smartfrz import FreezePredictor, SmartFrzPolicy
from hf_freezecache.smartfrz.history import NUM_FEATURES
from hf_freezecache.smartfrz.predictor import INPUTS, SHIPPED, load_predictor
from hf_freezecache.training.settings import read_settings


def histories(samples=3, window=8, seed=0):
    return torch.randn(samples, window, NUM_FEATURES, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def predictor():
    torch.manual_seed(0)
    return FreezePredictor(window=8).eval()


def test_what_lies_before_a_short_history_counts_nothing(predictor):
    values, lengths = histories(), torch.tensor([8, 5, 1])
    other = values.clone()
    other[1, :3], other[2, :7] = 100.0, -100.0
    assert torch.allclose(predictor(values, lengths), predictor(other, lengths))
    other[1, 3] = 100.0
    assert not torch.allclose(predictor(values, lengths), predictor(other, lengths))


def test_confidences_are_probabilities(predictor):
    confidence = predictor.confidence(histories(), torch.full((3,), 8))
    assert confidence.shape == (3,) and (confidence > 0).all() and (confidence < 1).all()
    assert not confidence.requires_grad


def test_without_attention_all_snapshots_count_the_same():
    torch.manual_seed(0)
    flat = FreezePredictor(window=8, attention=False).eval()
    values, lengths = histories(), torch.full((3,), 8)
    assert torch.allclose(flat(values, lengths), flat(values[:, torch.randperm(8)], lengths), atol=1e-6)


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_are_looked_at_and_others_are_not(name):
    values, lengths = histories(), torch.full((3,), 8)
    other = values.clone()
    other[:, :, INPUTS[name]] = 7.0
    blind = FreezePredictor(inputs=[each for each in INPUTS if each != name]).eval()
    assert torch.equal(blind(values, lengths), blind(other, lengths))
    seeing = FreezePredictor(inputs=[name]).eval()
    assert not torch.equal(seeing(values, lengths), seeing(other, lengths))


def test_quantiles_are_not_looked_at_unless_asked_for():
    values, lengths = histories(), torch.full((3,), 8)
    other = values.clone()
    other[:, :, INPUTS["quantiles"]] = 7.0
    predictor = FreezePredictor().eval()
    assert torch.equal(predictor(values, lengths), predictor(other, lengths))


@pytest.mark.parametrize("inputs", [["colour"], []])
def test_impossible_inputs_are_refused_with_the_possible_ones(inputs):
    with pytest.raises(ValueError, match="quantiles, scale, drift"):
        FreezePredictor(inputs=inputs)


def test_saved_predictor_is_loaded_as_it_was(predictor, tmp_path):
    predictor.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "README.md") == [
        "config.json",
        "model.safetensors",
    ]
    again = FreezePredictor.from_pretrained(str(tmp_path))
    assert again.window == 8 and torch.equal(
        again.eval()(histories(), torch.full((3,), 8)), predictor(histories(), torch.full((3,), 8))
    )


def test_without_a_predictor_the_policy_is_refused_in_words(monkeypatch, tmp_path):
    monkeypatch.setattr("hf_freezecache.smartfrz.predictor.SHIPPED", tmp_path)
    load_predictor.cache_clear()
    with pytest.raises(FileNotFoundError, match="policy='smartfrz' needs a predictor.*name another"):
        SmartFrzPolicy()
    with pytest.raises(FileNotFoundError, match="needs a predictor"):
        read_settings({"policy": "smartfrz"}, None)


def test_a_predictor_is_named_in_the_settings(predictor, tmp_path):
    predictor.save_pretrained(tmp_path)
    _, policy = read_settings({"policy": "smartfrz", "predictor": str(tmp_path), "max_frozen": 0.5}, None)
    assert isinstance(policy, SmartFrzPolicy) and policy.predictor.window == 8 and policy.max_frozen == 0.5
    assert f"predictor={str(tmp_path)!r}" in policy.describe()


def test_the_predictor_of_the_package_is_the_default_and_knows_what_moves_from_what_trembles(capfd):
    load_predictor.cache_clear()
    _, policy = read_settings({"policy": "smartfrz"}, None)
    assert policy.predictor is load_predictor(None) and policy.source is None and not policy.predictor.training
    run = made_up_run("new", "other", 5, (0.2, 0.95))
    recent = torch.from_numpy(run.fixed[30:46]).transpose(0, 1)
    for depth in (0.0, 0.5):  # the same for both
        recent[:, :, INPUTS["depth"]] = depth
        settled, moving = policy.predictor.confidence(recent, torch.full((2,), 16)).tolist()
        assert settled > 0.5 and settled > moving
    assert capfd.readouterr() == ("", "")


def test_the_card_of_the_package_tells_what_its_predictor_was_made_from():
    training = json.loads((SHIPPED / "training.json").read_text())
    card = (SHIPPED / "README.md").read_text()
    networks = {run["network"] for run in training["runs"]}
    assert networks >= {"resnet20", "vit", "deit", "minilm"} and not networks & {"mobilenetv2", "convnext"}
    assert all(f"| {network} |" in card for network in networks)
    validating = {run["run"] for run in training["runs"] if run["validates"]}
    assert {name.split("-")[0] for name in validating} == networks
    assert set(training["without_each_network"]) == networks
    assert set(json.loads((SHIPPED / "evaluation.json").read_text())["scores"]) == {"all", "mobilenetv2", "convnext"}
    assert (SHIPPED / "model.safetensors").stat().st_size < 500_000
