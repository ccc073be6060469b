"""Checkpoints are loaded completely or not at all."""

import json

import pytest
import safetensors.torch
import torch
from support import zoo
from torch import nn

from hf_freezecache.model.checkpoint import CheckpointError, has_weights, load_weights


def tensors(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def trained(name, seed=0):
    """A model whose every tensor differs from a fresh one's, BatchNorm statistics included."""
    model = zoo.make(name, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator).abs())
            elif tensor.ndim == 0:
                tensor.add_(3)  # BatchNorm's count of batches
    return model


@pytest.mark.parametrize("name", list(zoo.FAMILIES))
def test_saved_weights_load_bit_for_bit_into_another_model(name, tmp_path):
    model = trained(name)
    model.save_pretrained(tmp_path)
    assert has_weights(tmp_path)
    other = zoo.make(name, seed=1)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    load_weights(other, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(tensors(other), tensors(model))
    x = zoo.pixels(model)
    with torch.no_grad():
        assert torch.equal(other(x).logits, model(x).logits)


@pytest.mark.parametrize("name", ["vit", "resnet", "swin"])
def test_loading_keeps_parameters_modes_and_devices_of_the_model(name, tmp_path):
    """The optimizer holds the parameters: they must be filled, not replaced."""
    trained(name).save_pretrained(tmp_path)
    model = zoo.make(name, seed=1).train()
    before = {key: (parameter, parameter.requires_grad) for key, parameter in model.named_parameters()}
    next(model.parameters()).requires_grad_(False)
    load_weights(model, tmp_path)
    assert all(parameter is before[key][0] for key, parameter in model.named_parameters())
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * (len(before) - 1)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["vit", "dinov2", "resnet"])
def test_sharded_checkpoint_loads_bit_for_bit(name, tmp_path):
    model = trained(name)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").is_file() and has_weights(tmp_path)
    other = zoo.make(name, seed=1)
    load_weights(other, tmp_path)
    assert_equal(tensors(other), tensors(model))


def test_checkpoint_with_the_models_own_names_loads(tmp_path):
    model = trained("vit")
    model.save_pretrained(tmp_path, save_original_format=False)
    other = zoo.make("vit", seed=1)
    load_weights(other, tmp_path)
    assert_equal(tensors(other), tensors(model))


def test_bfloat16_checkpoint_loads_bit_for_bit(tmp_path):
    model = trained("vit").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    other = zoo.make("vit", seed=1).to(torch.bfloat16)
    load_weights(other, tmp_path)
    assert_equal(tensors(other), tensors(model))


def test_float32_model_keeps_its_precision_where_the_config_names_another(tmp_path):
    """A model loaded as bfloat16 and trained in float32 (`model.float()`) has both in its checkpoint."""
    model = trained("vit")
    model.config.dtype = torch.bfloat16
    model.save_pretrained(tmp_path)
    other = zoo.make("vit", seed=1)
    other.config.dtype = torch.bfloat16
    load_weights(other, tmp_path)
    assert_equal(tensors(other), tensors(model))


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_model_with_mixed_precision_parameters_loads_bit_for_bit(name, tmp_path):
    """A frozen half in bfloat16, a head in float32."""

    def mixed(seed):
        model = trained(name, seed).to(torch.bfloat16)
        model.classifier.float()
        return model

    model, other = mixed(0), mixed(1)
    with torch.no_grad():
        list(model.classifier.parameters())[0].add_(1e-4)  # lost if it went through bfloat16
    model.save_pretrained(tmp_path)
    load_weights(other, tmp_path)
    assert_equal(tensors(other), tensors(model))


def with_extra(seed):
    model = trained("vit", seed)
    torch.manual_seed(seed)
    model.classifier = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, zoo.CLASSES))
    model.vit.adapter = nn.Linear(4, 4)
    return model


def test_module_that_the_user_added_loads_bit_for_bit(tmp_path):
    model, other = with_extra(0), with_extra(1)
    model.save_pretrained(tmp_path)
    load_weights(other, tmp_path)
    assert_equal(tensors(other), tensors(model))


def test_module_of_a_class_of_the_users_loads_bit_for_bit(tmp_path):
    class Mine(type(zoo.vit())):
        def __init__(self, config, extra):
            super().__init__(config)
            self.scale = nn.Parameter(torch.full((extra,), float(extra)))

    model, other = Mine(zoo.vit().config, 3), Mine(zoo.vit().config, 3)
    with torch.no_grad():
        model.scale.fill_(9.0)
    model.save_pretrained(tmp_path)
    load_weights(other, tmp_path)
    assert_equal(tensors(other), tensors(model))


def test_plain_module_loads_bit_for_bit(tmp_path):
    model, other = zoo.ConvNet(), zoo.ConvNet()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    load_weights(other, tmp_path)
    assert_equal(tensors(other), tensors(model))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    third = zoo.ConvNet()
    load_weights(third, tmp_path)
    assert_equal(tensors(third), tensors(model))


def rewrite(path, change):
    file = path / "model.safetensors"
    content = safetensors.torch.load_file(file)
    change(content)
    safetensors.torch.save_file(content, file, metadata={"format": "pt"})


def drop(part):
    def change(content):
        key = next(key for key, value in content.items() if part in key and value.ndim)
        del content[key]

    return change


def resize(part):
    def change(content):
        key = next(key for key in content if part in key)
        content[key] = torch.zeros(*content[key].shape[:-1], content[key].shape[-1] + 1)

    return change


def add(content):
    content["surplus.weight"] = torch.zeros(2)


@pytest.mark.parametrize("name", ["vit", "deit", "swin", "resnet"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("classifier"), "missing.*classifier"),
        (drop("embed"), "missing.*embed"),
        (resize("classifier"), "classifier"),
        (add, "unexpected.*surplus"),
    ],
    ids=["missing head", "missing inner", "mismatched", "unexpected"],
)
def test_checkpoint_that_does_not_fit_is_an_error(name, change, message, tmp_path):
    trained(name).save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        load_weights(zoo.make(name, seed=1), tmp_path)


def test_checkpoint_that_does_not_fit_leaves_the_model_alone(tmp_path):
    """ "Completely or not at all"."""
    trained("vit").save_pretrained(tmp_path)
    rewrite(tmp_path, drop("classifier"))
    model = zoo.make("vit", seed=1)
    before = tensors(model)
    with pytest.raises(CheckpointError):
        load_weights(model, tmp_path)
    assert_equal(tensors(model), before)


def test_checkpoint_of_another_size_is_an_error(tmp_path):
    zoo.vit(hidden_size=32).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_weights(zoo.make("vit"), tmp_path)
    zoo.vit(num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="missing"):
        load_weights(zoo.make("vit"), tmp_path)
    zoo.vit(num_hidden_layers=4).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="unexpected"):
        load_weights(zoo.make("vit"), tmp_path)


def test_directory_without_weights_is_an_error(tmp_path):
    assert not has_weights(tmp_path)
    with pytest.raises(CheckpointError, match="no weights"):
        load_weights(zoo.make("vit"), tmp_path)


def test_missing_shard_is_an_error(tmp_path):
    trained("vit").save_pretrained(tmp_path, max_shard_size="10KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    (tmp_path / sorted(set(index["weight_map"].values()))[0]).unlink()
    with pytest.raises((CheckpointError, OSError)):
        load_weights(zoo.make("vit"), tmp_path)
