"""What the hooks into `Trainer` share: the state of a training, and questions about the trainer behind them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from transformers import Trainer

from ..config import FreezeCacheConfig
from ..distributed import Group
from ..model.modes import is_compiled
from ..policies import FreezePolicy, NonePolicy
from .callback import FreezeCallback
from .evaluation import EvaluationCache
from .scope import Scope, store_directory
from .session import FreezeSession

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object  # what stands behind the mixin is known where they are mixed


class TrainerHooks(_Trainer):
    """Base of the classes that override methods of `Trainer`; `FreezeCacheMixin` sets what is declared here."""

    _freeze_config: FreezeCacheConfig
    _freeze_explicit: bool
    _freeze_policy: FreezePolicy
    _freeze_callback: FreezeCallback
    _session: FreezeSession | None
    # Why the training that runs, or ran last, is a plain one although a policy freezes; None: it is not.
    _why_plain: str | None
    # Which processes see the stores of the training that runs.
    _scope: Scope
    # Of the checkpoint that a training is resumed from, until it is taken.
    _checkpoint_state: Mapping[str, Any] | None
    # While steps run for what they compute: the gradients that the training would follow, or those of the loss, which
    # a head start follows. None: the step that runs is one of the training.
    _captures: Literal["own", "exact"] | None = None
    # Of a step without a backward pass, where another mixin trains so; None: a step is one of each.
    _forward_passes: int | None = None
    # Operations between processes before the loss of the running batch.
    _operations_before_loss: int

    @property
    def _own_model(self) -> nn.Module:
        """The model, not wrapped."""
        assert self.model is not None  # `Trainer` declares it as optional, but is not made without one
        return getattr(self.model, "_orig_mod", self.model)  # of what `torch.compile(model)` returns

    @property
    def _is_active(self) -> bool:
        """Whether a training may be another than that of a plain `Trainer`."""
        config = self._freeze_config
        changes_more = bool(config.epochs_of_head_start) or config.changes_learning_rates
        return not isinstance(self._freeze_policy, NonePolicy) or changes_more

    @property
    def _group(self) -> Group:
        """The processes of the training."""
        return Group(self.accelerator.process_index, self.accelerator.num_processes)

    @property
    def _feature_cache_dir(self) -> Path:
        assert self.args.output_dir is not None  # `TrainingArguments` puts a name in place of None
        return store_directory(self._freeze_config, self.args.output_dir)

    def _find_scope(self) -> Scope:
        """Which processes see the stores.

        Raises:
            ValueError: under explicit settings, on every process, if some do not see those of the others.
        """
        why_not = "cache='never'" if self._freeze_config.cache == "never" else None
        if isinstance(self._freeze_policy, NonePolicy):
            why_not = "policy='none'"
        if self.args.n_gpu > 1:
            why_not = "several GPUs in one process"
        if why_not is not None:
            return Scope.without(self._group, why_not)
        scope = Scope.find(self._group, self._freeze_config, self._feature_cache_dir)
        if scope.is_blind and self._freeze_explicit:
            raise ValueError(scope.why_not)
        return scope

    @property
    def _runs_compiled(self) -> bool:
        """Whether steps run compiled code, which would run bypassed blocks."""
        return bool(self.args.torch_compile) or self.model is not self._own_model or is_compiled(self._own_model)

    @property
    def _evaluation(self) -> EvaluationCache | None:
        return None if self._session is None else self._session.evaluation

    def _overriding(self, name: str) -> type | None:
        """The class besides those of this package that overrides a method of `Trainer`; None if there is none."""
        others = (cls for cls in type(self).__mro__ if cls is not Trainer and not _is_of_package(cls))
        return next((cls for cls in others if name in vars(cls)), None)


def _is_of_package(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]
