"""Contexts in which a model runs in another mode, or with another `forward`, and is put back."""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ..rng import preserve_rng


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts the model in eval mode inside the context; restores every module's own mode after it.

    Compiled code runs uncompiled inside: it does not see hooks and replaced methods.
    """
    modes = [(module, module.training) for module in model.modules()]
    if any(training for _, training in modes):
        model.eval()
    try:
        with uncompiled(is_compiled(model)):
            yield
    finally:
        for module, training in modes:
            if module.training != training:
                object.__setattr__(module, "training", training)  # it runs often, on all modules: the quick way


def uncompiled(wanted: bool) -> contextlib.AbstractContextManager:
    """A context in which compiled code runs uncompiled, if that is wanted."""
    return torch.compiler.set_stance("force_eager") if wanted else contextlib.nullcontext()


def is_compiled(model: nn.Module) -> bool:
    """Whether a model, or a module of it, is compiled: by `module.compile()` or as what `torch.compile` returned."""
    return any(module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in model.modules())


@contextlib.contextmanager
def hooks_seen_by_compiled_code() -> Iterator[None]:
    """Inside, code is compiled anew for modules with other hooks; what was compiled before is forgotten.

    PyTorch leaves hooks out of the guards of compiled code by default: code of one model, compiled without hooks, then
    runs for the next model of this class, and its hooks are not called.
    """
    from torch._dynamo import config  # takes a second

    torch.compiler.reset()
    with config.patch(skip_nnmodule_hook_guards=False):
        yield


class ModuleStates:
    """What the modules of a model hold at the time when it is made: attributes, what dicts and lists among these hold,
    and the values of buffers.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module):
        self._attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
        values = [value for _, attributes in self._attributes for value in attributes.values()]
        self._dicts = [(value, dict(value)) for value in values if type(value) in (dict, OrderedDict)]
        self._lists = [(value, list(value)) for value in values if type(value) is list]
        self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def restore(self) -> None:
        """Puts all that back."""
        for present, before in (*self._attributes, *self._dicts):
            present.clear()
            present.update(before)
        for items, listed in self._lists:
            items[:] = listed
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Puts back modes, `requires_grad`, the global generators and what modules hold on leaving the context.

    That is everything but the values of parameters: buffers, new ones in the place of old ones, counters.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    states = ModuleStates(model)
    with preserve_rng(), eval_mode(model):
        try:
            yield
        finally:
            states.restore()
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


@contextlib.contextmanager
def override_forward(module: nn.Module, wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    """Overrides `forward` on one module instance inside the context; restores the instance's own override after it.

    Args:
        module: the instance.
        wrap: makes the new `forward` from the present one.
    """
    had_own, original = "forward" in module.__dict__, module.forward
    # The wrapped signature stays visible to code that inspects it (Trainer, DDP).
    module.forward = functools.wraps(original)(wrap(original))
    try:
        yield
    finally:
        if had_own:
            module.forward = original
        else:
            del module.forward
