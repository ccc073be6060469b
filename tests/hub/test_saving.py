"""What a head holds, what is refused, and what is said of it."""

import json
import logging
import shutil

import pytest
import safetensors.torch
import torch
from support import zoo
from support.heads import behind, change, load_base, logits, make_base, named, probe_of, trained
from support.helpers import messages
from support.untouched import assert_same, snapshot
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_freezecache import ChainError, HeadError, load_head, save_head, wrap_classifier
from hf_freezecache.hub.head_config import HeadConfig

CUT = 2


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base("vit", tmp_path_factory.mktemp("bases") / "vit")


def content_of(folder):
    return safetensors.torch.load_file(folder / "head.safetensors")


def config_of(folder):
    return json.loads((folder / "head_config.json").read_text())


# What is written


def test_head_holds_what_is_behind_the_cut_and_describes_it(base, tmp_path):
    model = trained(base, CUT)
    model.config.id2label = {0: "cat", 1: "dog", 2: "owl", 3: "fox", 4: "elk"}
    folder = save_head(model, tmp_path / "head", cut=CUT)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "head.safetensors", "head_config.json"]
    assert {*content_of(folder)} == {*behind(model, CUT)}
    config = config_of(folder)
    assert (config["format_version"], config["cut"], config["base"]) == (1, CUT, None)
    assert config["recipe"]["architecture"] == "ViTForImageClassification"
    assert (config["recipe"]["model_type"], config["recipe"]["dtype"]) == ("vit", "float32")
    assert config["blocks"] == ["vit.embeddings", "vit.layers.0", "vit.layers.1", "vit.layers.2"]
    assert [part["name"] for part in config["parts"]] == config["blocks"][:CUT]
    assert (config["num_labels"], config["id2label"]["3"]) == (5, "fox")
    assert load_head(folder, base=base).config.id2label[4] == "elk"


def test_head_is_smaller_than_the_model(base, tmp_path):
    folder = save_head(trained(base, 4), tmp_path / "head", cut=4)
    whole = (base / "model.safetensors").stat().st_size
    assert (folder / "head.safetensors").stat().st_size < whole / 5


def test_path_of_a_base_is_not_written_and_a_line_says_so(base, tmp_path, caplog):
    folder = save_head(trained(base, CUT), tmp_path / "head", cut=CUT)
    assert "is not written down: load the head with load_head(…, base=folder)" in messages(caplog)
    for path in folder.iterdir():
        assert str(base.parent).encode() not in path.read_bytes(), path.name
    with pytest.raises(HeadError, match=r"does not name the base .*: load_head\(…, base=…\)"):
        load_head(folder)


def test_saving_again_replaces_the_head_and_leaves_other_files(base, tmp_path):
    (tmp_path / "head").mkdir()
    (tmp_path / "head/notes.txt").write_text("mine")
    first = trained(base, CUT)
    save_head(first, tmp_path / "head", cut=CUT)
    change(first, behind(first, CUT), seed=9)
    save_head(first, tmp_path / "head", cut=CUT)
    assert torch.equal(logits(load_head(tmp_path / "head", base=base)), logits(first))
    assert (tmp_path / "head/notes.txt").read_text() == "mine"
    assert len(list((tmp_path / "head").iterdir())) == 4


def test_saving_and_loading_touch_no_generator_and_no_model(base, tmp_path):
    model = trained(base, CUT).train()
    before = snapshot(model)
    folder = save_head(model, tmp_path / "head", cut=CUT)
    load_head(folder, base=base)
    assert_same(snapshot(model), before)


# A prefix that was trained


def test_blocks_that_differ_from_the_base_are_saved_and_told(base, tmp_path, caplog):
    model = trained(base, 1)
    folder = save_head(model, tmp_path / "head", cut=3)
    assert [part["name"] for part in config_of(folder)["parts"] if part["included"]] == [
        "vit.layers.0",
        "vit.layers.1",
    ]
    assert "vit.layers.0, vit.layers.1 differ from the base: they were trained before they were frozen" in messages(
        caplog
    )
    assert "without them" in messages(caplog) and "whole" in messages(caplog)
    assert torch.equal(logits(load_head(folder, base=base)), logits(model))
    assert not any(name.startswith("vit.embeddings") for name in content_of(folder))


def test_head_without_its_trained_blocks_is_refused_with_the_sizes(base, tmp_path):
    with pytest.raises(HeadError, match=r"vit.layers.0 differ .*kB without them, .*kB with them, .*kB whole.*"):
        save_head(trained(base, 1), tmp_path / "head", cut=2, include_prefix=False)
    assert not (tmp_path / "head").exists()
    save_head(trained(base, 2), tmp_path / "head", cut=2, include_prefix=False)


def test_buffers_of_a_prefix_count(tmp_path):
    base = make_base("resnet", tmp_path / "base")
    model = load_base(base)
    name = "resnet.encoder.stages.0.layers.0.layer.0.normalization.running_mean"
    change(model, [name])
    folder = save_head(model, tmp_path / "head", cut=3)
    assert name in content_of(folder)
    assert torch.equal(logits(load_head(folder, base=base)), logits(model))


def test_whole_prefix_is_saved_where_no_base_is_known(tmp_path, caplog):
    model = zoo.make("vit")
    change(model, named(model))
    folder = save_head(model, tmp_path / "head", cut=CUT)
    assert "does not tell what it was loaded from: vit.embeddings, vit.layers.0" in messages(caplog)
    assert torch.equal(logits(load_head(folder)), logits(model))


def test_without_the_prefix_a_head_of_an_unknown_base_is_refused(tmp_path):
    with pytest.raises(HeadError, match="It is not known which blocks"):
        save_head(zoo.make("vit"), tmp_path / "head", cut=CUT, include_prefix=False)


# The base


def test_another_base_is_refused_with_both_digests_and_what_differs(base, tmp_path):
    folder = save_head(trained(base, CUT), tmp_path / "head", cut=CUT)
    other = load_base(base)
    change(other, ["vit.layers.0.mlp.fc1.weight"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(HeadError) as failure:
        load_head(folder, base=tmp_path / "other")
    text = str(failure.value)
    assert HeadConfig.read(folder / "head_config.json").sha256 in text
    assert "1 of 2 parts differ: vit.layers.0." in text and "load_head(…, base=…)" in text
    assert text.count("digest ") == 1 and len([word for word in text.split() if len(word.strip(",.")) == 64]) == 2


def test_base_with_another_number_of_labels_serves(base, tmp_path):
    """As public checkpoints do: their classifier is another."""
    model = ViTForImageClassification.from_pretrained(base, num_labels=3, ignore_mismatched_sizes=True)
    change(model, behind(model, CUT))
    folder = save_head(model, tmp_path / "head", cut=CUT)
    loaded = load_head(folder, base=base)
    assert loaded.config.num_labels == 3 and torch.equal(logits(loaded), logits(model))


def test_base_of_other_sizes_is_refused(base, tmp_path):
    folder = save_head(trained(base, CUT), tmp_path / "head", cut=CUT)
    ViTForImageClassification(ViTConfig(**{**zoo._TRANSFORMER, "hidden_size": 32})).save_pretrained(tmp_path / "other")
    with pytest.raises(HeadError, match="2 of 2 parts differ"):
        load_head(folder, base=tmp_path / "other")


def test_model_as_base_is_changed_in_place(base, tmp_path):
    model = trained(base, CUT)
    folder = save_head(model, tmp_path / "head", cut=CUT)
    mine = load_base(base)
    assert load_head(folder, base=mine) is mine
    assert torch.equal(logits(mine), logits(model))


@pytest.mark.parametrize("settings", [{"num_labels": 3}, {"hidden_size": 32}])
def test_model_that_does_not_fit_is_refused_and_unchanged(settings, base, tmp_path):
    folder = save_head(trained(base, CUT), tmp_path / "head", cut=CUT)
    mine = zoo.vit(**settings)
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    with pytest.raises(HeadError, match="has other shapes"):
        load_head(folder, base=mine)
    assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())


def test_model_of_another_class_is_refused(base, tmp_path):
    folder = save_head(trained(base, CUT), tmp_path / "head", cut=CUT)
    with pytest.raises(HeadError, match="the head is one of a ViTForImageClassification, not of a DeiTForImage"):
        load_head(folder, base=zoo.make("deit"))


def test_base_that_is_not_there_is_named(base, tmp_path):
    folder = save_head(trained(base, CUT), tmp_path / "head", cut=CUT)
    with pytest.raises(HeadError, match="the base .*nowhere cannot be loaded"):
        load_head(folder, base=tmp_path / "nowhere")


def test_pickled_weights_are_not_read(base, tmp_path):
    folder = save_head(trained(base, CUT), tmp_path / "head", cut=CUT)
    model = load_base(base)
    model.config.save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled/pytorch_model.bin")
    with pytest.raises(HeadError, match="Only safetensors are read"):
        load_head(folder, base=tmp_path / "pickled")


def test_adapters_beside_a_base_are_not_loaded(base, tmp_path):
    folder = save_head(trained(base, CUT), tmp_path / "head", cut=CUT)
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil/model"}))
    with pytest.raises(HeadError, match="has adapters of PEFT beside it: pass a base without"):
        load_head(folder, base=tmp_path / "base")


# Dtypes, shared weights, what is beside the tensors


@pytest.mark.parametrize("family, cut", [("vit", 2), ("llama", 2), ("resnet", 3)])
def test_model_of_half_precision_comes_back_bit_for_bit(family, cut, tmp_path):
    base = make_base(family, tmp_path / "base")
    model = trained(base, cut, dtype=torch.bfloat16)
    folder = save_head(model, tmp_path / "head", cut=cut, probe=probe_of(model))
    loaded = load_head(folder, base=base)
    assert loaded.dtype == torch.bfloat16 and torch.equal(logits(loaded), logits(model))


def test_prefix_and_head_may_have_different_dtypes(tmp_path):
    base = make_base("resnet", tmp_path / "base")
    model = trained(base, 2, dtype=torch.bfloat16)
    model.resnet.encoder.stages[1].layers[1].layer[0].normalization.float()
    folder = save_head(model, tmp_path / "head", cut=2)
    loaded = load_head(folder, base=base)
    kinds = {name: value.dtype for name, value in model.state_dict().items()}
    assert {name: value.dtype for name, value in loaded.state_dict().items()} == kinds
    assert torch.equal(logits(loaded), logits(model))


def test_buffers_that_a_cast_has_rounded_are_saved(tmp_path):
    """`model.bfloat16()` rounds the angles of Llama, which `from_pretrained` does not."""
    base = make_base("llama", tmp_path / "base")
    model = load_base(base).bfloat16()
    change(model, behind(model, 2, probe_of(model)))
    folder = save_head(model, tmp_path / "head", cut=2, probe=probe_of(model))
    assert torch.equal(logits(load_head(folder, base=base)), logits(model))


def test_another_dtype_is_asked_for(base, tmp_path):
    folder = save_head(trained(base, CUT), tmp_path / "head", cut=CUT)
    loaded = load_head(folder, base=base, dtype=torch.float16)
    assert {value.dtype for value in loaded.parameters()} == {torch.float16}
    assert load_head(folder, base=base, dtype="bfloat16", device_map="cpu").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype='int7' is no dtype"):
        load_head(folder, base=base, dtype="int7")


def test_tied_table_stays_with_the_base_and_stays_tied(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=3, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    model = load_base(tmp_path / "base")
    change(model, behind(model, 2, probe_of(model)))
    folder = save_head(model, tmp_path / "head", cut=2, probe=probe_of(model))
    assert not any("wte" in name or "lm_head" in name for name in content_of(folder))
    loaded = load_head(folder, base=tmp_path / "base")
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(logits(loaded), logits(model))


def test_attention_that_was_trained_with_is_used(base, tmp_path):
    model = trained(base, CUT, attn_implementation="eager")
    loaded = load_head(save_head(model, tmp_path / "head", cut=CUT), base=base)
    assert loaded.config._attn_implementation == "eager" and torch.equal(logits(loaded), logits(model))


def test_model_that_settings_do_not_make_is_loaded_on_a_model_only(base, tmp_path, caplog):
    model = trained(base, CUT)
    model.vit.layers[2].mlp.activation_fn = nn.ReLU()
    folder = save_head(model, tmp_path / "head", cut=CUT)
    assert "a model of the same settings and weights answers otherwise" in messages(caplog)
    with pytest.raises(HeadError, match="is no model that can be made of settings: pass one"):
        load_head(folder, base=base)
    mine = load_base(base)
    mine.vit.layers[2].mlp.activation_fn = nn.ReLU()
    assert torch.equal(logits(load_head(folder, base=mine)), logits(model))


# Models of other libraries


def test_wrapped_classifier_of_timm_is_made_anew(tmp_path):
    import timm

    torch.manual_seed(0)
    source = timm.create_model("test_resnet", num_classes=7)
    change(source, named(source), seed=1)
    (tmp_path / "base").mkdir()
    safetensors.torch.save_file(source.state_dict(), tmp_path / "base/model.safetensors")
    file = {"file": str(tmp_path / "base/model.safetensors"), "num_classes": 7}
    model = wrap_classifier(
        timm.create_model("test_resnet", pretrained=True, num_classes=5, pretrained_cfg_overlay=file)
    ).eval()
    probe = probe_of(model)
    change(model, behind(model, 3, probe))
    folder = save_head(model, tmp_path / "head", cut=3, probe=probe, base=str(tmp_path / "base"))
    assert {*content_of(folder)} < {*model.state_dict()}
    loaded = load_head(folder, base=tmp_path / "base")
    assert torch.equal(logits(loaded), logits(model))


def test_settings_of_timm_that_no_tensor_shows_are_found(tmp_path, caplog):
    import timm

    model = wrap_classifier(timm.create_model("test_vit", num_classes=5, act_layer=nn.ReLU)).eval()
    folder = save_head(model, tmp_path / "head", cut=2, probe=probe_of(model))
    assert "a model of the same settings and weights answers otherwise" in messages(caplog)
    with pytest.raises(HeadError, match="pass one"):
        load_head(folder)


def test_wrapped_module_of_ones_own_is_loaded_on_a_model(tmp_path):
    torch.manual_seed(0)
    mine = wrap_classifier(zoo.ConvNet()).eval()
    weights = {name: value.clone() for name, value in mine.state_dict().items()}
    probe = probe_of(mine)
    change(mine, [name for name in named(mine) if "head" in name])
    folder = save_head(mine, tmp_path / "head", cut=2, probe=probe)
    other = wrap_classifier(zoo.ConvNet()).eval()
    other.load_state_dict(weights)
    assert torch.equal(logits(load_head(folder, base=other)), logits(mine))


def test_adapters_are_refused_in_words(base, tmp_path):
    import peft

    model = peft.get_peft_model(load_base(base), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(HeadError, match="has adapters of PEFT.*merge_and_unload"):
        save_head(model, tmp_path / "head", cut=CUT, probe=probe_of(load_base(base)))


def test_model_without_data_is_refused(base, tmp_path):
    with pytest.raises(HeadError, match="has no data on this device"):
        save_head(zoo.make("vit").to("meta"), tmp_path / "head", cut=CUT, probe=probe_of(load_base(base)))


# The cut


@pytest.mark.parametrize("cut", [None, 0, 5, -1, True, 1.0, "2"])
def test_cut_that_is_none_is_refused(cut, base, tmp_path):
    with pytest.raises(HeadError, match="cut"):
        save_head(load_base(base), tmp_path / "head", cut=cut)


def test_texts_need_a_probe_and_are_told_so(tmp_path):
    base = make_base("bert", tmp_path / "base")
    with pytest.raises(ChainError, match="probe="):
        save_head(load_base(base), tmp_path / "head", cut=2)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(TypeError, match="pass a trainer or a model, not str"):
        save_head("model", tmp_path, cut=1)


def test_size_of_a_head_is_logged(base, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="hf_freezecache"):
        save_head(trained(base, CUT), tmp_path / "head", cut=CUT)
    assert "Head of ViTForImageClassification at cut 2: " in messages(caplog)
