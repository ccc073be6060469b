"""How `Trainer` continues from checkpoints of a training that freezes."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.utils import logging

from ..model.checkpoint import has_weights, is_adapter, load_weights
from .callback import FreezeCallback
from .checkpoint_state import read_state
from .hooks import TrainerHooks

logger = logging.get_logger(__name__)


class CheckpointHooks(TrainerHooks):
    """Takes what a checkpoint says of the freeze, and loads whole models strictly."""

    def _load_callback_state(self) -> None:
        # Called on a resume only. `create_optimizer` takes the state; `Trainer` would put an unattached callback in
        # our callback's place.
        callbacks: dict[str, Any] = self.state.stateful_callbacks  # type: ignore[assignment]  # a list only before
        ours = callbacks.pop(FreezeCallback.__name__, None)
        self._checkpoint_state = read_state(ours) if self._freezes else None
        super()._load_callback_state()
        if ours is not None:
            callbacks[FreezeCallback.__name__] = ours
        elif self._freezes:
            callbacks[FreezeCallback.__name__] = self._freeze_callback.state()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._loads_strictly(resume_from_checkpoint, "_load_from_checkpoint"):
            logger.info(f"Loading model from {resume_from_checkpoint}.")
            load_weights(self._own_model if model is None else model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, *([] if model is None else [model]))

    def _load_best_model(self) -> None:
        checkpoint = self.state.best_model_checkpoint
        if checkpoint is not None and self._loads_strictly(checkpoint, "_load_best_model"):
            logger.info(f"Loading best model from {checkpoint} (score: {self.state.best_metric}).")
            load_weights(self._own_model, checkpoint)
        else:
            super()._load_best_model()

    def _loads_strictly(self, checkpoint: str, loader: str) -> bool:
        """Whether this class loads a checkpoint: of a whole model in one process's memory.

        Adapters and sharded wrappers are loaded by `Trainer`, and what another class saves in its own way by that
        class. Where nothing can be frozen, `Trainer` loads as ever.

        Args:
            checkpoint: its directory.
            loader: the method of `Trainer` that would load it.
        """
        if not self._freezes or self._fell_back or self._overriding(loader) is not None:
            return False
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not has_weights(checkpoint):
            return False
        return not is_adapter(self.accelerator.unwrap_model(self.model))
