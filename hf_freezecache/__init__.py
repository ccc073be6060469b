"""A drop-in `transformers.Trainer` that freezes the first blocks of a model and trains the rest on cached features."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: Public name -> the module that defines it, which is imported when the name is first used: `freezecache --help` and
#: `import hf_freezecache` do not wait for Transformers.
_EXPORTS = {
    "BlockChain": "model.chain",
    "FeatureStore": "cache.store",
    "FreezeCacheConfig": "config",
    "FreezeCacheTrainer": "trainer",
    "FreezeCallback": "training.callback",
    "FreezePolicy": "policies",
    "ReplayCollator": "replay.collator",
    "ReplayableTransform": "augment.transforms",
    "make_codec": "cache.codec",
    "plan": "planning",
}

if TYPE_CHECKING:
    from .augment.transforms import ReplayableTransform
    from .cache.codec import make_codec
    from .cache.store import FeatureStore
    from .config import FreezeCacheConfig
    from .model.chain import BlockChain
    from .planning import plan
    from .policies import FreezePolicy
    from .replay.collator import ReplayCollator
    from .trainer import FreezeCacheTrainer
    from .training.callback import FreezeCallback

__all__ = [
    "BlockChain",
    "FeatureStore",
    "FreezeCacheConfig",
    "FreezeCacheTrainer",
    "FreezeCallback",
    "FreezePolicy",
    "ReplayCollator",
    "ReplayableTransform",
    "make_codec",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
