"""A digest of how a model's prefix computes, its tensors apart: configuration, code, attributes and hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from ..model.neutral import neutral_settings
from .installed import global_name_of, package_of
from .value_digest import ValueDigest

#: Entries of a model's configuration that do not change the features.
_IRRELEVANT_CONFIG = {"transformers_version", "_name_or_path", "architectures"}
# `save_pretrained` adds these to a configuration; the dtypes of the tensors themselves are in the digest.
_IRRELEVANT_CONFIG |= {"dtype", "torch_dtype"}
#: Attributes of every module, and those that a training sets, which do not change what it computes.
_IRRELEVANT = set(vars(nn.Module())) | {
    "_gradient_checkpointing_func",
    "_hf_hook",
    "_is_accelerate_prepared",
    "_is_hf_initialized",
    "_old_forward",
    "_original_forward",
    "forward",
    "generation_config",
    "gradient_checkpointing",
    "name_or_path",
    "warnings_issued",
}
#: Attributes and hooks that FSDP2 gives a module, its state behind them: how weights are split changes no feature.
_OF_FSDP = ("__composable_api_state_key", "_is_fsdp_managed_module", "_fsdp_use_orig_params")
#: Packages that put hooks and forwards into models which change nothing that the fingerprint does not tell.
_HARMLESS = {"hf_freezecache", "accelerate"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def prefix_digest(model: nn.Module, modules: Iterable[nn.Module], digest: ValueDigest, neutral: bool = False) -> str:
    """Digest of what the features depend on besides the prefix's tensors.

    Args:
        model: the model.
        modules: all modules that run before the cut, submodules included.
        digest: of values.
        neutral: whether dropout and the classes of the head were tried to change no feature (`is_neutral`), so that
            models that differ in these alone have one digest.

    Returns:
        64 hexadecimal digits.
    """
    with neutral_settings(model) if neutral else contextlib.nullcontext():
        return digest.parts("prefix", _prefix_parts(model, {id(module) for module in modules}, digest)).hex()


def _prefix_parts(model: nn.Module, members: set[int], digest: ValueDigest) -> list[Any]:
    # A patched forward may refer to the model, whose later blocks change while it trains.
    for name, part in [*model.named_modules(), *model.named_parameters(), *model.named_buffers()]:
        digest.name(part, name)
    parts: list[Any] = [_settings(getattr(model, "config", None))]
    for name, module in model.named_modules():
        # A module that holds one of the prefix's runs it, by its own code and attributes.
        if id(module) in members or any(id(child) in members for child in module.modules()):
            parts += [name, *_module_parts(module)]
    return parts


def _module_parts(module: nn.Module) -> list[Any]:
    names = [name for name in sorted(vars(module)) if name not in _IRRELEVANT and not name.startswith(_OF_FSDP)]
    attributes = {name: vars(module)[name] for name in names if not _is_of_fsdp(vars(module)[name])}
    attributes = {
        name: _settings(value) if isinstance(value, PretrainedConfig) else value for name, value in attributes.items()
    }
    parts: list[Any] = [class_of(module), attributes, _own_forward(module)]
    for kind in _HOOKS:
        parts += [kind, [hook for hook in getattr(module, kind).values() if not _is_harmless(hook)]]
    return parts


def class_of(module: nn.Module) -> type:
    """The class of a module, as it was before FSDP2 put one derived from it in its place."""
    kind = type(module)
    return kind.__mro__[2] if _is_of_fsdp(kind) else kind


def _is_of_fsdp(value: Any) -> bool:
    """Whether a class, or a method that an instance was given, is FSDP2's: it gathers weights around the own one."""
    function = getattr(value, "__func__", value)
    code = getattr(function, "__code__", None)
    name = "" if code is None else code.co_filename.replace("\\", "/")
    named = isinstance(value, type) and value.__module__.startswith("torch.distributed.fsdp")
    return named or "/torch/distributed/fsdp/" in name


def _own_forward(module: nn.Module) -> Any:
    """The forward that somebody has put into this instance; None if there is none but harmless wrappers."""
    own = vars(module)
    forward = own.get("forward")
    if forward is not None and _is_harmless(forward):
        forward = next((own[name] for name in ("_old_forward", "_original_forward") if name in own), None)
    if isinstance(forward, MethodType) and forward.__self__ is module:
        forward = forward.__func__
    return None if forward is getattr(type(module), "forward", None) else forward


def _is_harmless(function: Any) -> bool:
    function = getattr(function, "__func__", function)
    function = getattr(function, "func", function)  # of a partial
    module = global_name_of(function) if isinstance(function, FunctionType) else type(function).__module__
    return package_of(module) in _HARMLESS


def _settings(config: Any) -> Mapping[str, Any]:
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    settings = {name: value for name, value in sorted(settings.items()) if name not in _IRRELEVANT_CONFIG}
    return {**settings, "attention": getattr(config, "_attn_implementation", None)}
