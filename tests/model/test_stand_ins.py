import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hf_freezecache.model.stand_ins import FrozenOutputError, StandIn

CPU = torch.device("cpu")


def images(is_input=True):
    return StandIn((4, 3, 8, 8), torch.float32, CPU, "'pixel_values'", is_input)


def weight():
    return torch.randn(5, 3, 3, 3, requires_grad=True)


def assign(stand_in):
    real = torch.zeros(4, 3, 8, 8)
    real[0] = stand_in[0]


READS = {
    "number": lambda x: x.mean().item(),
    "float": lambda x: float(x.sum()),
    "branch": lambda x: bool((x > 0).any()),
    "format": lambda x: f"{x.mean():.3f}",
    "list": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "numpy of a copy": lambda x: x.cpu().detach().numpy(),
    "asarray": lambda x: np.asarray(x.detach()),
    "comparison": lambda x: torch.equal(x, x),
    "closeness": lambda x: torch.allclose(x, torch.zeros(4, 3, 8, 8)),
    "positions": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "unique values": lambda x: x.unique(),
    "index": lambda x: torch.rand(4)[x[:, 0, 0, 0] > 0],
    "backward": lambda x: F.conv2d(x, weight()).sum().backward(),
    "loss beside a real one": lambda x: (weight().sum() + x.mean()).backward(),
    "added to a real tensor": lambda x: torch.zeros(4, 3, 8, 8).add_(x),
    "copied to a real tensor": lambda x: torch.zeros(4, 3, 8, 8).copy_(x),
    "assigned to a part": assign,
    "pickle": pickle.dumps,
    "memory": lambda x: x.data_ptr(),
    "largest of an iteration": lambda x: max(x.flatten()),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_reading_values_is_an_error_that_names_what_is_missing(read):
    with pytest.raises(FrozenOutputError, match="'pixel_values' is read"):
        read(images())


def test_tensors_are_passed_through_and_computed_from_without_values():
    x = images()
    assert x.flatten(1).shape == (4, 192) and x.to(torch.bfloat16).dtype == torch.bfloat16
    convolved = F.conv2d(x, weight())
    assert isinstance(convolved, StandIn) and convolved.shape == (4, 5, 6, 6) and convolved.requires_grad
    joined = torch.cat([x, torch.ones(4, 3, 8, 8)])
    assert isinstance(joined, StandIn) and joined.shape == (8, 3, 8, 8)
    assert "pixel_values" in repr(x) and len(x) == 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.linear(x.flatten(1), torch.randn(2, 192)).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [torch.zeros_like, torch.ones_like, torch.rand_like, lambda x: x.new_ones(3)])
def test_what_depends_on_the_shape_alone_is_real(make):
    made = make(images())
    assert type(made) is torch.Tensor and made.dtype == torch.float32 and float(made.sum()) >= 0


def test_random_numbers_of_a_shape_are_those_of_a_real_tensor():
    torch.manual_seed(0)
    expected = torch.rand_like(torch.zeros(4, 3, 8, 8))
    torch.manual_seed(0)
    assert torch.equal(torch.rand_like(images()), expected)


@pytest.mark.parametrize("keep", [lambda x: x.to("cpu"), lambda x: x.detach(), lambda x: x.clone(), torch.Tensor.half])
def test_a_moved_input_still_is_the_input(keep):
    assert keep(images()).is_input and not keep(images(is_input=False)).is_input


def zeroed(x):
    x = x.clone()
    x[0] = 0
    return x


@pytest.mark.parametrize(
    "change", [lambda x: x.flip(-1), lambda x: x * 1.0, lambda x: x[:2], lambda x: x.clamp_(0, 1), zeroed]
)
def test_a_changed_input_is_not_the_input_any_more(change):
    assert not change(images()).is_input
