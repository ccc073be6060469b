"""The settings and the policy that a user gives to a trainer, in all their forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, get_args

from ..config import FreezeCacheConfig, PolicyName
from ..policies import (
    SETTLING,
    AutoPolicy,
    DelayedPolicy,
    FreezeOutPolicy,
    FreezePolicy,
    FrozenFromStart,
    LinearPolicy,
    ManualPolicy,
    NonePolicy,
)
from ..smartfrz import SmartFrzPolicy


def read_settings(settings: Any, policy: Any) -> tuple[FreezeCacheConfig, FreezePolicy]:
    """The settings and the policy that a user gives to a trainer.

    Args:
        settings: a `FreezeCacheConfig`, or its fields as a dict; None: the defaults.
        policy: a policy, or the name of one, which wins over that of the settings; None: that of the settings.

    Raises:
        TypeError: if they are of another type; the message says what to pass.
        ValueError: if a value is not possible.
    """
    if settings is None:
        settings = {}
    if isinstance(settings, Mapping):
        known = [entry.name for entry in fields(FreezeCacheConfig)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ValueError(f"freeze_cache: unknown {', '.join(unknown)}; the settings are {', '.join(known)}.")
        if isinstance(policy, str) and "policy" not in settings:
            settings = {**settings, "policy": policy}
        settings = FreezeCacheConfig(**settings)
    if not isinstance(settings, FreezeCacheConfig):
        raise TypeError(
            f"freeze_cache={settings!r}: pass a FreezeCacheConfig, or a dict of its fields such as "
            "{'policy': 'manual', 'freeze_points': '1:4'}."
        )
    if isinstance(policy, str):
        settings = settings if policy == settings.policy else settings.with_policy(policy)  # type: ignore[arg-type]  # checked there
        policy = None
    if policy is not None and not isinstance(policy, FreezePolicy):
        raise TypeError(
            f"policy={policy!r}: pass one of {', '.join(get_args(PolicyName))}, or an object of a class derived from "
            "FreezePolicy."
        )
    if policy is not None and settings.head_start_epochs is None:
        settings = replace(settings, head_start_epochs=0)  # the policy of the settings is not the one that is used
    return settings, _with_learning_rates(settings, make_policy(settings) if policy is None else policy)


def _with_learning_rates(settings: FreezeCacheConfig, policy: FreezePolicy) -> FreezePolicy:
    if settings.anneal != "none" and isinstance(policy, NonePolicy):
        raise ValueError("anneal lets learning rates fall until a block freezes, and policy='none' freezes none.")
    if settings.anneal_epochs:
        policy = DelayedPolicy(policy, settings.anneal_epochs)
    if settings.layer_decay_min:
        why = f"layer_decay={settings.layer_decay}, layer_decay_min={settings.layer_decay_min}"
        policy = FrozenFromStart(policy, settings.cut_at_start, why)
    return policy


def make_policy(config: FreezeCacheConfig) -> FreezePolicy:
    """The policy that the settings name."""
    assert config.max_frozen is not None  # the settings choose one
    if config.policy == "none":
        return NonePolicy()
    if config.policy == "manual":
        assert config.freeze_points is not None  # the settings check it
        return ManualPolicy(config.freeze_points)
    if config.policy == "auto":
        return AutoPolicy(config.max_frozen, config.freeze_end)
    if config.policy == "freezeout":
        return FreezeOutPolicy(config.freeze_start, max_frozen=config.max_frozen)
    if config.policy == "smartfrz":
        return SmartFrzPolicy(config.predictor, max_frozen=config.max_frozen)
    if config.policy in SETTLING:
        return SETTLING[config.policy](max_frozen=config.max_frozen)
    return LinearPolicy(config.freeze_start, config.freeze_end, config.max_frozen, config.freeze_stages)
