import pytest
import torch
from support.helpers import tiny_resnet, tiny_vit
from torch import nn

from hf_freezecache.model.chain import BlockChain
from hf_freezecache.training.watch import FrozenWatch, checksums


def frozen(model, cut=2):
    chain = BlockChain.from_model(model)
    chain.freeze(cut)
    return chain


def prefix_weight(chain):
    return next(iter(chain.prefix_parameters(chain.cut).values()))


def test_an_unchanged_prefix_is_silent_though_the_suffix_learns():
    chain = frozen(tiny_vit())
    watch = FrozenWatch(chain)
    with torch.no_grad():
        chain.model.classifier.weight.add_(1)
    assert watch.at_step() is None and watch.at_epoch() is None


def test_weights_loaded_with_the_same_values_are_no_change():
    chain = frozen(tiny_vit())
    watch = FrozenWatch(chain)
    chain.model.load_state_dict(chain.model.state_dict())
    assert watch.at_step() is None and watch.at_epoch() is None


def test_a_parameter_that_was_made_trainable_is_named():
    chain = frozen(tiny_vit())
    watch = FrozenWatch(chain)
    prefix_weight(chain).requires_grad_(True)
    assert "made trainable" in watch.at_step() and "vit.embeddings" in watch.at_step()


def test_a_change_in_place_is_seen_at_the_step():
    chain = frozen(tiny_vit())
    watch = FrozenWatch(chain)
    with torch.no_grad():
        prefix_weight(chain).mul_(1 + 1e-6)
    assert "values of 'vit.embeddings" in watch.at_step()


def through_data(parameter):
    parameter.data.flatten()[0] += 1e-3


def swapped(parameter):
    parameter.data = parameter.data + 1e-3


@pytest.mark.parametrize("change", [through_data, swapped])
def test_a_change_behind_the_version_counter_is_seen_at_the_epoch(change):
    chain = frozen(tiny_vit())
    watch = FrozenWatch(chain)
    change(prefix_weight(chain))
    assert "values of" in watch.at_epoch()


def test_values_in_another_order_are_seen():
    chain = frozen(tiny_vit())
    watch = FrozenWatch(chain)
    weight = prefix_weight(chain)
    weight.data = weight.detach().flip(-1).contiguous()
    assert "values of" in watch.at_epoch()


def test_batchnorm_statistics_count():
    chain = frozen(tiny_resnet())
    watch = FrozenWatch(chain)
    name = next(name for name in chain.prefix_buffers(2) if name.endswith("running_mean"))
    chain.model.get_buffer(name).add_(1)
    assert f"values of '{name}'" in watch.at_step()


def test_replaced_modules_and_tensors_are_named():
    chain = frozen(tiny_vit())
    watch = FrozenWatch(chain)
    layers = chain.model.vit.layers
    layers[0] = tiny_vit(seed=1).vit.layers[0]
    assert "module 'vit.layers.0" in watch.at_epoch() and "replaced" in watch.at_epoch()
    chain = frozen(tiny_vit())
    watch = FrozenWatch(chain)
    projection = chain.model.vit.embeddings.patch_embeddings.projection
    projection.bias = nn.Parameter(torch.zeros_like(projection.bias))
    assert "projection.bias' was replaced by another tensor" in watch.at_epoch()


def test_checksums_tell_every_type_of_tensor():
    tensors = {
        "half": torch.tensor([1.0], dtype=torch.bfloat16),
        "flag": torch.tensor([True, False]),
        "number": torch.tensor(3),
        "empty": torch.empty(0),
        "complex": torch.tensor([1 + 2j]),
    }
    before = checksums(tensors)
    assert before == checksums(tensors)
    for name in ("half", "number", "complex"):
        tensors[name] += 1
    tensors["flag"] |= True
    assert {name for name, value in checksums(tensors).items() if value != before[name]} == set(tensors) - {"empty"}
