"""Heads that anybody may have written: whatever is wrong with one is a `HeadError`, or nothing is."""

import copy
import json
import shutil
import time

import psutil
import pytest
import safetensors.torch
import torch
import transformers
from support.heads import load_base, logits, make_base, timm_wrapper, trained

from hf_freezecache import HeadError, load_head, save_head
from hf_freezecache.hub.head_config import HeadConfig
from hf_freezecache.hub.saving import file_sha256
from hf_freezecache.hub.tensors import Part, total_sha256

DEEP = json.loads("[" * 500 + "]" * 500)
HOSTILE = [
    *(None, True, False, 0, -1, 2**31, 2**63, 10**30, 0.5, 1e308, float("nan"), float("inf")),
    *("", "..", "../x", "/etc/passwd", "a\0b", "\ud800", "x" * 5000, "https://example.org/x", "file:///etc/passwd"),
    *([], {}, [None], {"": None}, {"a": {"b": {}}}, [[[]]], DEEP, {"../x": "../y"}),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base("vit", tmp_path_factory.mktemp("bases") / "vit")


@pytest.fixture(scope="module")
def model(base):
    return trained(base, 2)


@pytest.fixture(scope="module")
def original(model, tmp_path_factory):
    return save_head(model, tmp_path_factory.mktemp("heads") / "head", cut=2)


@pytest.fixture
def head(original, tmp_path):
    return shutil.copytree(original, tmp_path / "head")


def read(head):
    return json.loads((head / "head_config.json").read_text())


def write(head, content):
    """Whatever is in it, with the right digests."""
    weights = head / "head.safetensors"
    if weights.exists() and isinstance(content, dict) and isinstance(content.get("weights_sha256"), str):
        content["weights_sha256"] = file_sha256(weights)
    try:
        parts = [Part(**{**part, "tensors": tuple(part["tensors"])}) for part in content["parts"]]
        content["prefix_sha256"] = total_sha256(parts)
    except (TypeError, KeyError, AttributeError, UnicodeEncodeError):
        pass
    (head / "head_config.json").write_text(json.dumps(content))


def places(content, path=()):
    """The path of every value in a JSON value."""
    if path:
        yield path
    if isinstance(content, dict) and len(content) < 60:
        for name in content:
            yield from places(content[name], (*path, name))
    elif isinstance(content, list):
        for number in range(min(len(content), 1)):
            yield from places(content[number], (*path, number))


def put(content, path, value):
    changed = copy.deepcopy(content)
    place = changed
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return changed


def assert_refused_or_equal(head, base, model):
    try:
        loaded = load_head(head, base=base)
    except HeadError:
        return
    assert type(loaded) is type(model)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_no_value_anywhere_gets_through(original, base, model, tmp_path):
    """Every field, replaced by every hostile value: refused, or the model that was trained."""
    content = read(original)
    paths = [path for path in places(content) if path[:2] != ("recipe", "config")]
    assert len(paths) > 30
    head = shutil.copytree(original, tmp_path / "head")
    for path in paths:
        for value in HOSTILE:
            try:
                write(head, put(content, path, value))
            except UnicodeEncodeError:
                continue
            try:
                config = HeadConfig.read(head / "head_config.json")
            except HeadError:
                continue
            assert config.recipe.kind in ("transformers", "timm", "own")
            assert_refused_or_equal(head, base, model)


SETTINGS = [None, -1, 0, 10**9, 1e308, "../x", DEEP, {"a": 1}, ["x"]]


@pytest.mark.parametrize("values", [[2**24], pytest.param(SETTINGS, marks=pytest.mark.slow)], ids=["large", "all"])
def test_no_setting_makes_a_larger_model_or_runs_for_long(values, original, base, model, tmp_path):
    """Every setting of the model's configuration: refused in a few seconds and little memory, or the same weights."""
    content = read(original)
    head = shutil.copytree(original, tmp_path / "head")
    memory, began = psutil.Process().memory_info().rss, time.monotonic()
    for name in content["recipe"]["config"]:
        for value in values:
            write(head, put(content, ("recipe", "config", name), value))
            assert_refused_or_equal(head, base, model)
    assert psutil.Process().memory_info().rss - memory < 500e6
    assert time.monotonic() - began < 60 * len(values)


@pytest.mark.parametrize(
    "settings, why",
    [
        ({"auto_map": {"AutoModel": "evil--code.Model"}}, "could fetch something or run other code"),
        ({"attn_implementation": "evil/kernel"}, "could fetch something"),
        ({"_attn_implementation": "evil/kernel"}, "could fetch something"),
        ({"_attn_implementation_internal": "evil/kernel"}, "could fetch something"),
        ({"experts_implementation": "evil/kernel"}, "could fetch something"),
        ({"quantization_config": {"quant_method": "evil"}}, "could fetch something"),
        ({"transformers_weights": "../../weights.safetensors"}, "could fetch something"),
        ({"name_or_path": "/etc"}, "could fetch something"),
        ({"kernel_config": {}}, "could fetch something"),
        ({"backbone": "https://example.org/model"}, "no name of an architecture"),
        ({"backbone": "../../weights"}, "no name of an architecture"),
        ({"use_pretrained_backbone": True}, "would fetch weights"),
        ({"text_config": {"inner": {"auto_map": {}}}}, "could fetch something"),
        ({"num_hidden_layers": 10**9}, "no size of a model"),
        ({"num_hidden_layers": 10**6}, "more parameters than the head speaks of"),
        ({"hidden_size": 2**23, "num_attention_heads": 2}, "than this machine has memory for"),
        ({"num_channels": 2**24}, "is too small for the head: .* values are wanted of it, and its weights have"),
        ({"hidden_size": 32}, "has other shapes"),
        ({"num_hidden_layers": 2}, "lacks tensors of the head"),
        ({"num_hidden_layers": 4}, "has tensors that the head does not know"),
        ({"to_dict": "x", "forward": "y"}, "can be made of the settings|does not fit|"),
    ],
)
def test_settings_that_fetch_run_or_grow_are_refused(settings, why, head, base, model):
    content = read(head)
    content["recipe"]["config"].update(settings)
    write(head, content)
    if why.endswith("|"):
        assert_refused_or_equal(head, base, model)
        return
    with pytest.raises(HeadError, match=why):
        load_head(head, base=base)


@pytest.mark.parametrize(
    "recipe, why",
    [
        ({"architecture": "os.system"}, "is not a model of the installed Transformers"),
        ({"architecture": "Evil"}, "is not a model of the installed Transformers"),
        ({"architecture": "Trainer"}, "is not a model of the installed Transformers"),
        ({"architecture": "ViTConfig"}, "is not a model of the installed Transformers"),
        ({"architecture": "AutoModel"}, "is not a model of the installed Transformers"),
        ({"architecture": "PreTrainedModel"}, "is not a model of the installed Transformers"),
        ({"architecture": "BertForSequenceClassification"}, "is a model of type 'bert', not 'vit'"),
        ({"architecture": "../evil"}, "'architecture' is not what a head holds"),
        ({"architecture": "evil/code"}, "'architecture' is not what a head holds"),
        ({"model_type": "bert"}, "is a model of type 'vit', not 'bert'"),
        ({"kind": "timm", "architecture": "resnet18", "config": {"num_classes": 5}}, "does not fit"),
        ({"kind": "timm", "architecture": "no_such", "config": {}}, "not an architecture of the installed timm"),
        ({"kind": "own"}, "pass one"),
        ({"attention": "evil/kernel"}, "'attention' is not what"),
        ({"dtype": "qint8"}, "'dtype' is not what"),
    ],
)
def test_foreign_architectures_are_refused(recipe, why, head, base):
    content = read(head)
    content["recipe"].update(recipe)
    write(head, content)
    with pytest.raises(HeadError, match=why):
        load_head(head, base=base)


@pytest.mark.parametrize(
    "settings",
    [
        {"architecture": "hf-hub:evil/model"},
        {"architecture": "local-dir:/tmp"},
        {"model_args": {"checkpoint_path": "/tmp/evil.pth"}},
        {"model_args": {"pretrained": True}},
        {"model_args": {"pretrained_cfg_overlay": {"file": "/tmp/evil.pth"}}},
        {"model_args": {"cache_dir": "/tmp/x"}},
        {"model_args": {"img_size": 10**9}},
        {"model_args": {"depth": 10**6}},
        {"model_args": {"no_such": "x"}},
    ],
)
def test_settings_of_timm_fetch_and_unpickle_nothing(settings, tmp_path):
    torch.manual_seed(0)
    timm_wrapper().save_pretrained(tmp_path / "base")
    head = save_head(
        load_base(tmp_path / "base"), tmp_path / "head", cut=2, probe={"pixel_values": torch.zeros(2, 3, 160, 160)}
    )
    content = read(head)
    content["recipe"]["config"].update(settings)
    write(head, content)
    with pytest.raises(HeadError):
        load_head(head, base=tmp_path / "base")


@pytest.mark.parametrize("name", ["/etc", "../../x", "a/b/c", "evil//x", "https://example.org/x", "C:\\x", ".", "~"])
def test_base_in_a_head_is_an_id_on_the_hub_only(name, head):
    content = read(head)
    content["base"] = name
    write(head, content)
    with pytest.raises(HeadError, match="'base' is not what a head holds there"):
        load_head(head)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 100_000, '{"a": ' * 100_000, "\0", '{"format_version": 1}']
)
def test_text_that_is_no_configuration_is_refused(text, head):
    (head / "head_config.json").write_text(text)
    with pytest.raises(HeadError):
        load_head(head)


def test_large_configuration_is_not_read(head):
    with (head / "head_config.json").open("ab") as file:
        file.truncate(2**30)
    with pytest.raises(HeadError, match="1,073,741,824 bytes: no head has so much to tell"):
        load_head(head)


@pytest.mark.parametrize("version", [0, 2, "1", 1.5, True, None])
def test_another_version_names_the_remedy(version, head, base):
    content = read(head)
    content["format_version"] = version
    (head / "head_config.json").write_text(json.dumps(content))
    with pytest.raises(HeadError, match="this release reads version 1: install the release"):
        load_head(head, base=base)


# The weights


def rewrite(head, change):
    """Other weights, with digest and shapes as the configuration should have them or not."""
    weights = safetensors.torch.load_file(head / "head.safetensors")
    change(weights)
    safetensors.torch.save_file(weights, head / "head.safetensors", metadata={"format": "pt"})
    write(head, read(head))


def test_missing_and_unexpected_tensors_are_errors(head, base):
    rewrite(head, lambda weights: weights.pop("classifier.weight"))
    with pytest.raises(HeadError, match="lacks 1 tensors, e.g. classifier.weight"):
        load_head(head, base=base)
    rewrite(head, lambda weights: weights.update({"classifier.weight": torch.zeros(5, 16), "extra": torch.zeros(2)}))
    with pytest.raises(HeadError, match="has unexpected 1 tensors, e.g. extra"):
        load_head(head, base=base)


def test_tensors_of_a_prefix_cannot_be_slipped_in(head, base):
    name = "vit.embeddings.cls_token"
    rewrite(head, lambda weights: weights.update({name: torch.zeros(1, 1, 16)}))
    content = read(head)
    content["tensors"][name] = ["float32", [1, 1, 16]]
    write(head, content)
    with pytest.raises(HeadError, match="contradicts itself on what is in head.safetensors"):
        load_head(head, base=base)


def test_misshapen_tensor_is_an_error(head, base):
    rewrite(head, lambda weights: weights.update({"classifier.weight": torch.zeros(5, 17)}))
    with pytest.raises(HeadError, match="is not the file that head_config.json describes"):
        load_head(head, base=base)
    content = read(head)
    content["tensors"]["classifier.weight"] = ["float32", [5, 17]]
    write(head, content)
    with pytest.raises(HeadError, match=r"classifier.weight \(5, 16\) instead of \(5, 17\)"):
        load_head(head, base=base)


def test_flipped_bit_is_found(head, base):
    path = head / "head.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(HeadError, match="it was damaged"):
        load_head(head, base=base)


@pytest.mark.parametrize("content", [b"", b"x" * 100, (2**60).to_bytes(8, "little") + b"{}", b"\x80\x04]."])
def test_weights_that_are_no_safetensors_are_refused(content, head, base):
    (head / "head.safetensors").write_bytes(content)
    with pytest.raises(HeadError, match="is no file of safetensors"):
        load_head(head, base=base)


@pytest.mark.parametrize("name", ["head.safetensors", "head_config.json"])
def test_missing_file_is_named(name, head, base):
    (head / name).unlink()
    with pytest.raises(HeadError, match=f"there is no head in .*: it has no file {name}"):
        load_head(head, base=base)


def test_code_beside_a_head_is_not_run(head, base, model, monkeypatch):
    (head / "modeling_vit.py").write_text("raise SystemExit('code of a head was run')")
    (head / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "modeling_vit.X"}, "model_type": "vit"}))
    (head / "pytorch_model.bin").write_bytes(b"\x80\x04]")
    assert torch.equal(logits(load_head(head, base=base)), logits(model))


def test_trust_remote_code_is_never_passed(head, base, monkeypatch):
    seen = []
    real = transformers.ViTForImageClassification.from_pretrained.__func__

    def note(cls, *args, **kwargs):
        seen.append(kwargs)
        return real(cls, *args, **kwargs)

    monkeypatch.setattr(transformers.ViTForImageClassification, "from_pretrained", classmethod(note))
    load_head(head, base=base)
    assert seen and all("trust_remote_code" not in kwargs and kwargs["use_safetensors"] for kwargs in seen)


def test_what_is_neither_folder_nor_id_is_refused():
    with pytest.raises(HeadError, match="it is no folder, and no id on the Hub"):
        load_head("no/such/folder")
