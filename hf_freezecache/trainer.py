"""`transformers.Trainer` with freezing, caching and replay."""

from __future__ import annotations

from transformers import Trainer

from .training.trainer_hooks import FreezeCacheMixin
from .zeroth_order.mixin import ZeroOrderMixin


class FreezeCacheTrainer(FreezeCacheMixin, Trainer):
    """A drop-in `Trainer` that freezes the first blocks of a model on a schedule and replaces their forward pass by
    cached features.

    Takes the arguments of `Trainer` as they are, and two more. Samplers, collator, optimizer, schedule, evaluation and
    checkpoints stay those of `Trainer`.

    Args:
        freeze_cache: when to freeze and how features are stored. None means the defaults; then a training that cannot
            be frozen or cached (iterable data, an unknown model) runs as plain training after one warning, where
            explicit settings that cannot be honoured are an error.
        policy: a freezing rule; wins over `freeze_cache.policy`.

    Raises:
        ValueError: at `train()`, if the explicit settings do not fit model or data.
    """


class ZeroOrderTrainer(ZeroOrderMixin, FreezeCacheTrainer):
    """A `FreezeCacheTrainer` that trains without a backward pass: on features, steps run the live blocks forward only.

    Takes the arguments of `FreezeCacheTrainer`, and one more.

    Args:
        zero_order: how slopes are estimated; None means the defaults.

    Raises:
        ValueError: at `train()`, if the settings do not fit model or data, or do not go with zeroth-order training.
    """
