"""Freeze settled blocks, cache their features, train the rest on the cache: a drop-in `transformers.Trainer`."""

from .cache.codec import make_codec
from .cache.store import FeatureStore
from .callback import FreezeCallback
from .chain import BlockChain
from .config import FreezeCacheConfig
from .planning import plan
from .policies import FreezePolicy
from .replay.collator import ReplayCollator
from .trainer import FreezeCacheTrainer
from .transforms import ReplayableTransform

__version__ = "0.1.0"

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
