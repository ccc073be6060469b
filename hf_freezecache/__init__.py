"""A drop-in `transformers.Trainer` that freezes the first blocks of a model and trains the rest on cached features."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: Public name -> the module that defines it, which is imported when the name is first used: `freezecache --help` and
#: `import hf_freezecache` do not wait for Transformers.
_EXPORTS = {
    "BlockChain": "model.chain",
    "BuildFailed": "build.errors",
    "ChainError": "model.errors",
    "CheckpointError": "model.checkpoint",
    "ComingFreeze": "policies",
    "FeatureStore": "cache.store",
    "FreezeCacheConfig": "config",
    "FreezeCacheMixin": "training.trainer_hooks",
    "FreezeCacheReport": "training.report",
    "FreezeCacheTrainer": "trainer",
    "FreezeCallback": "training.callback",
    "FreezePolicy": "policies",
    "FreezeStatus": "training.report",
    "FrozenOutputError": "model.stand_ins",
    "HeadError": "hub.errors",
    "MismatchError": "training.proof",
    "Moment": "policies",
    "ObservedBlock": "policies",
    "Plan": "estimate.costs",
    "PlanRow": "estimate.costs",
    "PushError": "hub.errors",
    "RehearsalError": "training.rehearsal",
    "ReplayCollator": "replay.collator",
    "ReplayableTransform": "augment.transforms",
    "StoreError": "cache.manifest",
    "ZeroOrderConfig": "zeroth_order.config",
    "ZeroOrderMixin": "zeroth_order.mixin",
    "ZeroOrderTrainer": "trainer",
    "load_head": "hub.loading",
    "make_codec": "cache.codec",
    "plan": "planning",
    "push_head_to_hub": "hub.pushing",
    "save_head": "hub.saving",
    "wrap_classifier": "model.classifiers",
}

if TYPE_CHECKING:
    from .augment.transforms import ReplayableTransform
    from .build.errors import BuildFailed
    from .cache.codec import make_codec
    from .cache.manifest import StoreError
    from .cache.store import FeatureStore
    from .config import FreezeCacheConfig
    from .estimate.costs import Plan, PlanRow
    from .hub.errors import HeadError, PushError
    from .hub.loading import load_head
    from .hub.pushing import push_head_to_hub
    from .hub.saving import save_head
    from .model.chain import BlockChain
    from .model.checkpoint import CheckpointError
    from .model.classifiers import wrap_classifier
    from .model.errors import ChainError
    from .model.stand_ins import FrozenOutputError
    from .planning import plan
    from .policies import ComingFreeze, FreezePolicy, Moment, ObservedBlock
    from .replay.collator import ReplayCollator
    from .trainer import FreezeCacheTrainer, ZeroOrderTrainer
    from .training.callback import FreezeCallback
    from .training.proof import MismatchError
    from .training.rehearsal import RehearsalError
    from .training.report import FreezeCacheReport, FreezeStatus
    from .training.trainer_hooks import FreezeCacheMixin
    from .zeroth_order.config import ZeroOrderConfig
    from .zeroth_order.mixin import ZeroOrderMixin

__all__ = [
    "BlockChain",
    "BuildFailed",
    "ChainError",
    "CheckpointError",
    "ComingFreeze",
    "FeatureStore",
    "FreezeCacheConfig",
    "FreezeCacheMixin",
    "FreezeCacheReport",
    "FreezeCacheTrainer",
    "FreezeCallback",
    "FreezePolicy",
    "FreezeStatus",
    "FrozenOutputError",
    "HeadError",
    "MismatchError",
    "Moment",
    "ObservedBlock",
    "Plan",
    "PlanRow",
    "PushError",
    "RehearsalError",
    "ReplayCollator",
    "ReplayableTransform",
    "StoreError",
    "ZeroOrderConfig",
    "ZeroOrderMixin",
    "ZeroOrderTrainer",
    "load_head",
    "make_codec",
    "plan",
    "push_head_to_hub",
    "save_head",
    "wrap_classifier",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
