"""How `Trainer` continues from checkpoints of a training that freezes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..distributed import Announcer
from ..model.checkpoint import CheckpointError, has_weights, is_adapter, load_weights, loads_in_its_own_way
from .callback import FreezeCallback
from .checkpoint_state import find_checkpoints, read_state, read_untrained
from .hooks import TrainerHooks
from .preconditions import check_model

logger = logging.get_logger(__name__)

#: Methods of `Trainer` that write a model's weights.
_SAVERS = ("_save", "save_model", "_save_checkpoint")


class CheckpointHooks(TrainerHooks):
    """Takes what a checkpoint says of the freeze, loads whole models strictly, and passes over half checkpoints."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`. With `resume_from_checkpoint=True` it goes on from the newest complete checkpoint.

        A process that is killed while it writes a checkpoint leaves half of one, which `Trainer` would take for the
        newest. It is passed over with a warning; if there is no other one, the training begins anew.

        Args:
            resume_from_checkpoint: directory of a checkpoint; True: the newest in `output_dir`; None: none.
            args, kwargs: see `Trainer.train`.

        Raises:
            ValueError: if it is True and there is no checkpoint at all.
        """
        if resume_from_checkpoint is True and self._is_active:
            resume_from_checkpoint = self._newest_checkpoint()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _newest_checkpoint(self) -> str | bool | None:
        """The newest complete one; True where there is none, so that `Trainer` says so; None if all are incomplete."""
        directory = Path(str(self.args.output_dir))
        complete, incomplete = self._group.on_main(lambda: find_checkpoints(directory))
        if not incomplete:
            return str(complete[-1]) if complete else True
        newest = str(complete[-1]) if complete else None
        names = ", ".join(map(str, incomplete))
        Announcer(self._group, logger).warning(
            f"Incomplete checkpoints, of a process that was killed, are passed over: {names}. "
            + ("The training begins anew." if newest is None else f"The training goes on from {newest}.")
        )
        return newest

    def _load_callback_state(self) -> None:
        # Called on a resume only. `create_optimizer` takes the state; `Trainer` would put an unattached callback in
        # our callback's place.
        callbacks: dict[str, Any] = self.state.stateful_callbacks  # type: ignore[assignment]  # a list only before
        ours = callbacks.pop(FreezeCallback.__name__, None)
        self._checkpoint_state = read_state(ours) if self._is_active else None
        if ours is not None and read_untrained(ours) and not self._freeze_explicit:
            self._leave_untrained()
        super()._load_callback_state()
        if ours is not None:
            callbacks[FreezeCallback.__name__] = ours
        elif self._is_active:
            callbacks[FreezeCallback.__name__] = self._freeze_callback.state()

    def _leave_untrained(self) -> None:
        """Goes on with a training in which nothing is frozen, though its weights are trained by now."""
        self._why_plain, self._freeze_callback.was_untrained = "it has begun from an initialization", True
        if self._session is not None:
            self._session.close()
            self._session = None
        self._freeze_callback.attach(None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_strictly(resume_from_checkpoint, "_load_from_checkpoint", model):
            super()._load_from_checkpoint(resume_from_checkpoint, *([] if model is None else [model]))

    def _load_best_model(self) -> None:
        checkpoint = self.state.best_model_checkpoint
        if checkpoint is None or not self._load_strictly(checkpoint, "_load_best_model"):
            super()._load_best_model()

    def _load_strictly(self, checkpoint: str, loader: str, model: nn.Module | None = None) -> bool:
        """Loads a checkpoint strictly, if it is this class that loads it.

        Adapters and sharded wrappers are loaded by `Trainer`; what another class, or the model, saves or loads in its
        own way is loaded as they do it. Where nothing can be frozen, `Trainer` loads as ever.

        Args:
            checkpoint: its directory.
            loader: the method of `Trainer` that would load it.
            model: the one to load into, if it is not the trainer's.

        Returns:
            Whether it was loaded.

        Raises:
            CheckpointError: if it holds other weights than the model's.
        """
        if not self._is_active or self._why_plain is not None or self._overriding(loader) is not None:
            return False
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not has_weights(checkpoint):
            return False
        if is_adapter(self.accelerator.unwrap_model(self.model)) or loads_in_its_own_way(self._own_model):
            return False
        try:
            check_model(self, self._own_model, self._freeze_config)
        except ValueError:
            return False  # it will not be frozen, as `train` says
        logger.info(f"Loading the model strictly from {checkpoint}.")
        try:
            load_weights(self._own_model if model is None else model, checkpoint)
        except CheckpointError as error:
            saver = next((self._overriding(name) for name in _SAVERS if self._overriding(name) is not None), None)
            if saver is None:
                raise
            logger.warning(f"`{saver.__name__}` saves checkpoints in its own way; `Trainer` loads this one: {error}")
            return False
        return True
