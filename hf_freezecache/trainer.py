"""`transformers.Trainer` with freezing, caching and replay."""

from __future__ import annotations

from transformers import Trainer

from .training.trainer_hooks import FreezeCacheMixin


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
