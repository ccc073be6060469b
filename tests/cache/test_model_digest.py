"""What of a model's prefix counts besides its tensors: everything that can change a feature, and nothing else."""

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.state import AcceleratorState
from torch import nn

from hf_freezecache.cache.model_digest import prefix_digest
from hf_freezecache.cache.value_digest import ValueDigest


class Block(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.conv(x)


class Net(nn.Module):
    def __init__(self, mean=0.0, **attributes):
        super().__init__()
        self.mean, self.first, self.second = mean, Block(**attributes), Block()

    def forward(self, pixel_values):
        return self.second(self.first(pixel_values - self.mean))


def digest(net):
    return prefix_digest(net, net.first.modules(), ValueDigest())


def hooked(kind, factor=2):
    net = Net()
    if kind == "forward":
        net.first.register_forward_hook(lambda module, inputs, output: output * factor)
    elif kind == "pre":
        net.first.conv.register_forward_pre_hook(lambda module, inputs: (inputs[0] * factor,))
    elif kind == "model":
        net.register_forward_pre_hook(lambda module, inputs: (inputs[0] * factor,))
    else:
        old = net.first.forward
        net.first.forward = lambda x: old(x) * factor
    return net


CHANGED = {
    "activation": lambda: Net(act=torch.relu),
    "other activation": lambda: Net(act=torch.tanh),
    "list": lambda: Net(scale=[1.0]),
    "longer list": lambda: Net(scale=[1.0, 2.0]),
    "scaling": lambda: Net(scaling={"default": 1.0}),
    "other scaling": lambda: Net(scaling={"default": 2.0}),
    "tensor": lambda: Net(scale=torch.ones(3)),
    "other tensor": lambda: Net(scale=torch.full((3,), 2.0)),
    "value of the model": lambda: Net(1.0),
    "tensor of the model": lambda: Net(torch.ones(1)),
    "stride": lambda: Net(inner=nn.Conv2d(3, 3, 1, stride=2)),
    **{f"{kind} hook": lambda kind=kind: hooked(kind) for kind in ("forward", "pre", "model", "patched")},
    **{f"other {kind} hook": lambda kind=kind: hooked(kind, 3) for kind in ("forward", "pre", "model", "patched")},
}


def test_every_change_is_told_apart_and_none_twice():
    digests = {name: digest(make()) for name, make in CHANGED.items()}
    assert digests == {name: digest(make()) for name, make in CHANGED.items()}
    assert len({digest(Net()), *digests.values()}) == len(CHANGED) + 1


@pytest.mark.parametrize("attribute", ["scale", "act"])
def test_blocks_after_the_cut_do_not_count(attribute):
    net = Net()
    setattr(net.second, attribute, 5.0)
    net.second.register_forward_hook(lambda module, inputs, output: output)
    assert digest(net) == digest(Net())


def test_modes_and_wrappers_of_a_training_do_not_count():
    expected = digest(Net())
    net = Net().eval().requires_grad_(False)
    add_hook_to_module(net.first, ModelHook())
    assert digest(net) == expected
    AcceleratorState._reset_state(reset_partial_state=True)  # of tests before
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    assert digest(accelerator.prepare(Net())) == expected


def test_patched_forward_counts_below_the_wrapper_of_a_training():
    def patched():
        net = Net()
        net.forward = lambda pixel_values: net.first(pixel_values) * 2
        return net

    AcceleratorState._reset_state(reset_partial_state=True)  # of tests before
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    assert digest(accelerator.prepare(patched())) != digest(Net())
