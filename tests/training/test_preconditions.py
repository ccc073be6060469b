"""What cannot be frozen and cached is refused before any data is touched."""

import pytest
import torch
from support.helpers import tiny_vit
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_freezecache.model.chain import BlockChain
from hf_freezecache.training.preconditions import check_trainable, why_quantized


class Packed(torch.Tensor):
    """What torchao's tensors are to torch: a subclass that holds plain tensors."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(tensors, context, size, stride):
        return Packed(tensors["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Packed(args[0].inner)
        raise NotImplementedError(func)


class Bits(nn.Parameter):
    """What bitsandbytes makes of a weight."""


def test_plain_model_is_not_quantized():
    assert why_quantized(tiny_vit()) is None


def test_tensor_of_a_subclass_is_quantized():
    model = tiny_vit()
    weight = nn.Parameter(Packed(torch.zeros(5, 32, dtype=torch.int8)), requires_grad=False)
    assert is_traceable_wrapper_subclass(weight)
    model.classifier.weight = weight
    assert "Packed, e.g. 'classifier.weight'" in why_quantized(model)


def test_packed_integers_are_quantized():
    model = tiny_vit()
    model.classifier.weight = Bits(torch.zeros(5, 16, dtype=torch.uint8), requires_grad=False)
    assert "Bits, e.g. 'classifier.weight'" in why_quantized(model)


def test_modules_with_packed_weights_are_quantized():
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear}, torch.qint8)
    assert "quantized modules" in why_quantized(model)


def test_model_that_transformers_has_quantized_is_named():
    model = tiny_vit()
    model.hf_quantizer, model.quantization_method = object(), "torchao"
    assert why_quantized(model) == "quantized models (torchao)"


def test_cut_that_leaves_nothing_to_train_is_refused():
    model = tiny_vit()
    chain = BlockChain.from_model(model)
    for parameter in [*model.classifier.parameters(), *model.vit.layernorm.parameters()]:
        parameter.requires_grad_(False)
    check_trainable(chain, 3)
    with pytest.raises(ValueError, match="cut 4 freezes 4 of 4 blocks.*nothing is left to train"):
        check_trainable(chain, 4)
