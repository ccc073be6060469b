"""What measuring must leave alone: a model's tensors, modes and hooks, and the generators."""

import random

import numpy as np
import torch


def snapshot(model):
    """Everything of a model and of the process that probing must leave alone."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "buffers": {name: value.clone() for name, value in model.named_buffers()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: [len(value) for key, value in vars(module).items() if key.endswith("_hooks")]
            for name, module in model.named_modules()
        },
        "forwards": [name for name, module in model.named_modules() if "forward" in vars(module)],
        "random": [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().clone()],
    }


def assert_same(first, second):
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for name in first:
            assert_same(first[name], second[name])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


def with_gradients(model):
    """As in the middle of an accumulation, with one parameter that the user has frozen."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    frozen.grad = None
    return model.train()
