"""The contract with `transformers.Trainer`: every override of it, and every use of what is private to it.

`tests/test_trainer_contract.py` compares the names, signatures and bodies that are used here with those of the
installed release.
"""

from __future__ import annotations

import contextlib
import logging as python_logging
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import speed_metrics
from transformers.utils import logging

from ..augment.mixing import Mixer, soft_cross_entropy
from ..build.context import BuildContext
from ..cache.rows import RowSource, check_dataset, split_batch
from ..config import FreezeCacheConfig, make_policy
from ..distributed import Announcer, Group
from ..model.chain import BlockChain
from ..model.checkpoint import has_weights, is_adapter, load_weights
from ..model.inputs import ModelInputs
from ..model.layout import FeatureLayout
from ..model.tracing import main_input_name
from ..policies import FreezePolicy, NonePolicy
from ..replay.collator import ReplayCollator
from ..replay.dataset import ReplayDataset
from ..rng import preserve_rng
from .callback import FreezeCallback
from .checkpoint_state import read_state
from .epoch_source import EpochSource, FromStore
from .evaluation import EvaluationCache, EvaluationPass, UsersLoader, cached_names
from .report import FreezeCacheReport, FreezeStatus, count_trainable, make_report
from .session import FreezeSession
from .sharding import why_sharded

logger = logging.get_logger(__name__)

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object  # what stands behind the mixin is known where they are mixed


class FreezeCacheMixin(_Trainer):
    """Adds freezing, caching and replay to a `Trainer`: `class MyTrainer(FreezeCacheMixin, AnyTrainerSubclass)`.

    Takes the arguments of the trainer behind it as they are, and two more. Samplers, collator, optimizer, schedule,
    evaluation and checkpoints stay those of that trainer.

    Args:
        freeze_cache: when to freeze and how features are stored. None means the defaults; then a training that cannot
            be frozen or cached (iterable data, an unknown model) runs as plain training after one warning, where
            explicit settings that cannot be honoured are an error.
        policy: a freezing rule; wins over `freeze_cache.policy`.

    Raises:
        ValueError: at `train()`, if the explicit settings do not fit model or data.
    """

    def __init__(
        self, *args, freeze_cache: FreezeCacheConfig | None = None, policy: FreezePolicy | None = None, **kwargs
    ):
        self._freeze_explicit = freeze_cache is not None or policy is not None
        self._freeze_config = freeze_cache if freeze_cache is not None else FreezeCacheConfig()
        self._freeze_policy = policy if policy is not None else make_policy(self._freeze_config)
        self._session: FreezeSession | None = None
        self._fell_back = self._starting = False
        # Of the checkpoint that a training is resumed from, until it is taken.
        self._checkpoint_state: Mapping[str, Any] | None = None
        super().__init__(*args, **kwargs)
        self._mixer = self._make_mixer()
        _follow_log_level(self.args)
        self._freeze_callback = FreezeCallback(self._freeze_policy)
        if self._freezes:
            self.add_callback(self._freeze_callback)

    @property
    def _own_model(self) -> nn.Module:
        """The model, not wrapped."""
        assert self.model is not None  # `Trainer` declares it as optional, but is not made without one
        return self.model

    def freeze_status(self) -> FreezeStatus:
        """The cut, the frozen blocks and the store of the running or last training."""
        if self._session is not None:
            return self._session.status()
        return FreezeStatus(0, [], count_trainable(self._own_model), replaying=False, store_path=None, store_bytes=0)

    def freeze_cache_report(self) -> FreezeCacheReport:
        """What the running or last training has cost, by phase."""
        return make_report([], None) if self._session is None else self._session.report()

    def build_context(self, dataset: Any, collator: Callable) -> BuildContext:
        """Model, samples and settings as stores of a training on a data set would be built from them.

        Args:
            dataset: as `without_unused_columns` returned it.
            collator: the same.

        Raises:
            ValueError: if the rows cannot be cached or the model cannot be split.
        """
        reason = why_sharded(self)
        if reason is not None:
            raise ValueError(f"freezing and caching do not work with {reason}; use DDP (accelerate launch).")
        check_dataset(dataset)
        source = RowSource(
            dataset,
            collator,
            batch_size=self._train_batch_size,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            num_workers=self.args.dataloader_num_workers,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
        )
        model_inputs = ModelInputs(self._own_model, self._prepare_inputs, self.label_names)
        with preserve_rng():
            probe = source.probe()
            split_batch(probe, main_input_name(self._own_model))  # a clear error before the model sees the batch
            model_inputs.include_labels_if_needed(probe)
            chain = BlockChain.from_model(self._own_model, self._freeze_config.blocks, probe=model_inputs(probe))
        return BuildContext(
            chain=chain,
            source=source,
            config=self._freeze_config,
            cache_dir=self._feature_cache_dir,
            group=self._group,
            model_inputs=model_inputs,
            precision=f"{self.accelerator.mixed_precision}/{next(self._own_model.parameters()).dtype}",
            disable_tqdm=bool(self.args.disable_tqdm),
        )

    def without_unused_columns(self, dataset: Any, description: str = "training") -> tuple[Any, Callable]:
        """A data set and its collator without the columns that the model does not take."""
        if isinstance(dataset, datasets.Dataset):
            return self._remove_unused_columns(dataset, description=description), self.data_collator
        return dataset, super()._get_collator_with_removed_columns(self.data_collator, description=description)

    def _make_mixer(self) -> Mixer | None:
        config = self._freeze_config
        if not config.mixup_alpha and not config.cutmix_alpha:
            return None
        classes = getattr(getattr(self.model, "config", None), "num_labels", None)
        if classes is None:
            raise ValueError("mixup and cutmix make labels of probabilities: the model needs `config.num_labels`.")
        if type(self).compute_loss is not Trainer.compute_loss:
            logger.warning(
                f"Mixup and cutmix: `{type(self).__name__}.compute_loss` gets labels of probabilities (B, K). "
                "Compute the loss from the logits; what models compute from such labels is another loss."
            )
        if self.compute_loss_func is None:
            # The models' own losses take class numbers; a loss function of the user's gets the soft labels.
            self.compute_loss_func = partial(soft_cross_entropy, label_smoothing=self.args.label_smoothing_factor)
        return Mixer(config.mixup_alpha, config.cutmix_alpha, classes)

    # One training at a time

    def _inner_training_loop(self, *args, **kwargs):
        # Also entered again by `auto_find_batch_size` after it ran out of memory.
        if self._session is not None:
            self._session.close()
            self._session = None
        self._fell_back, self._starting = False, True
        self._checkpoint_state = None
        self._freeze_callback.attach(None)
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            if self._session is not None:
                self._session.stop()

    @property
    def _freezes(self) -> bool:
        return not isinstance(self._freeze_policy, NonePolicy)

    @property
    def _group(self) -> Group:
        return Group(self.accelerator.process_index, self.accelerator.num_processes)

    def _start_session(self, dataset: Any, collator: Callable) -> FreezeSession | None:
        try:
            session = self._group.on_all(lambda: self._make_session(dataset, collator))
        except Exception as error:  # under the defaults nothing that plain `Trainer` can do may fail
            self._cannot_freeze(error)
            return None
        if self.args.n_gpu > 1:
            logger.warning("Several GPUs in one process: blocks are frozen, but not cached. Use `accelerate launch`.")
        if self.args.torch_compile:
            logger.warning("torch_compile: live epochs run compiled, replay epochs do not.")
        return session

    def _make_session(self, dataset: Any, collator: Callable) -> FreezeSession:
        why_not_cached = "cache='never'" if self._freeze_config.cache == "never" else None
        if self.args.n_gpu > 1:
            why_not_cached = "several GPUs in one process"
        session = FreezeSession(
            self.build_context(dataset, collator),
            self._freeze_explicit,
            why_not_cached,
            self._why_on_images(),
            is_last=lambda: self.state.global_step >= self.state.max_steps or self.control.should_training_stop,
        )
        self._freeze_policy.start(session.num_blocks)
        return session

    def _why_on_images(self) -> str | None:
        """Why evaluations cannot be from a store; None if they can."""
        if "inputs" in self.args.include_for_metrics:
            return "include_for_metrics asks for the inputs"
        if getattr(self.args, "predict_with_generate", False):
            return "predict_with_generate"
        overriding = self._overriding("prediction_step")
        return None if overriding is None else f"`{overriding.__name__}.prediction_step` is overridden"

    def _overriding(self, name: str) -> type | None:
        """The class besides this one that overrides a method of `Trainer`; None if there is none."""
        others = (cls for cls in type(self).__mro__ if cls not in (FreezeCacheMixin, Trainer))
        return next((cls for cls in others if name in vars(cls)), None)

    def _cannot_freeze(self, error: Exception) -> None:
        """Raises under explicit settings; the defaults fall back to plain training."""
        if self._freeze_explicit:
            raise error
        self._fell_back = True
        Announcer(self._group, logger).failure("Nothing is frozen or cached, this is plain training", error)

    @property
    def _feature_cache_dir(self) -> Path:
        configured = self._freeze_config.feature_cache_dir
        assert self.args.output_dir is not None  # `TrainingArguments` puts a name in place of None
        return Path(configured) if configured is not None else Path(self.args.output_dir) / "_freeze_cache"

    # Data: the source of the train loader's samples can turn to a store

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ) -> DataLoader:
        settings = dict(sampler_fn=sampler_fn, is_training=is_training, dataloader_key=dataloader_key)
        if not is_training and description == "Evaluation" and self._evaluation is not None:
            loader = self._get_eval_loader(self._evaluation, dataset, description, batch_size, settings)
            if loader is not None:
                return loader
        if not is_training or not self._freezes or not self._starting:
            return super()._get_dataloader(dataset, description, batch_size, **settings)
        self._starting = False  # a loader that is asked for besides is plain
        inner, collator = self.without_unused_columns(dataset, description)
        self._session = self._start_session(inner, collator)
        self._freeze_callback.attach(self._session)
        if self._session is None:
            return super()._get_dataloader(dataset, description, batch_size, **settings)
        if self._evaluation is not None:
            # Loaders of an earlier training or evaluation, kept for their workers, know nothing of this session.
            self.__dict__.pop("_eval_dataloaders", None)
        wrapped = ReplayDataset(inner, self._session.switch, self._session.context.source.seed)
        return self._get_replay_loader(wrapped, collator, description, batch_size, settings)

    def _get_eval_loader(
        self, evaluation: EvaluationCache, dataset, description, batch_size, settings: dict[str, Any]
    ) -> DataLoader | None:
        """A loader whose samples can come from a store; None if they cannot."""
        trainers = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        inner, collator = self.without_unused_columns(dataset, description)
        is_trainers = any(dataset is one for one in trainers)
        loader = UsersLoader(dataset, self.data_collator, inner, collator, batch_size, is_trainers)
        wrapped = evaluation.wrap(loader)
        if wrapped is None:
            return None
        return self._get_replay_loader(wrapped, collator, description, batch_size, settings)

    def _get_replay_loader(
        self, wrapped: ReplayDataset, collator: Callable, description, batch_size, settings: dict[str, Any]
    ) -> DataLoader:
        users_collator, self.data_collator = self.data_collator, ReplayCollator(collator)
        sampler_fn = settings["sampler_fn"]
        if sampler_fn is not None:
            # Samplers see the user's data set: lengths and columns are read from it.
            settings = {**settings, "sampler_fn": lambda _: sampler_fn(wrapped.inner)}
        try:
            return super()._get_dataloader(wrapped, description, batch_size, **settings)
        finally:
            self.data_collator = users_collator

    def _get_collator_with_removed_columns(self, data_collator: Callable, description: str | None = None) -> Callable:
        if isinstance(data_collator, ReplayCollator):
            return data_collator  # unused columns were removed before, where the user's data set is known
        return super()._get_collator_with_removed_columns(data_collator, description=description)

    # Optimizer and steps

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._session is not None and self._checkpoint_state is not None:
            # After the optimizer has its groups, before its state is loaded and the model is wrapped.
            self._session.load_state_dict(self._checkpoint_state["cut"], self._checkpoint_state["session"])
            self._freeze_callback.load_state_dict(self._checkpoint_state)
            self._checkpoint_state = None
        return optimizer

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        model, train_dataloader = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self._session is not None:
            self._session.prepared(self.optimizer, model)
        elif self._freezes and not self._fell_back:
            self._cannot_freeze(ValueError("`get_train_dataloader` is overridden and does not call `Trainer`'s."))
        return model, train_dataloader

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs) -> torch.Tensor:
        if self._session is None:
            return super().training_step(model, self._mix(inputs), *args, **kwargs)
        with self._session.training_step(inputs, force_eager=self.args.torch_compile) as step:
            return super().training_step(model, self._mix(step.inputs, step.layout), *args, **kwargs)

    def _mix(self, inputs: dict[str, Any], layout: FeatureLayout | None = None) -> dict[str, Any]:
        """Mixes images of a live batch, or features of a replayed one."""
        if self._mixer is None:
            return inputs
        return self._mixer(self._prepare_inputs(inputs), main_input_name(self._own_model), layout=layout)

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        if self._session is not None:
            self._session.before_forward()
        return super().compute_loss_context_manager()

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:  # type: ignore[override]  # `Trainer` adds floats
        return super().floating_point_ops(inputs) if self._session is None else self._session.step_flops()

    def _track_num_input_tokens(self, inputs) -> None:
        # Codes are no tokens, and a warning in every step helps nobody.
        if self._session is None or not isinstance(self._session.source, FromStore):
            super()._track_num_input_tokens(inputs)

    # Evaluation

    @property
    def _evaluation(self) -> EvaluationCache | None:
        return None if self._session is None else self._session.evaluation

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        evaluation = self._evaluation
        if evaluation is None:
            return super().evaluate(*args, **kwargs)
        with evaluation.evaluation() as passes:
            metrics = super().evaluate(*args, **kwargs)
            for first in list(passes) if evaluation.is_last() else ():
                # Callbacks may have evaluated other sets inside under the same names: they change nothing here.
                own = {name for name, value in first.metrics.items() if metrics.get(name) == value}
                with preserve_rng():
                    on_images = self._repeat_last(evaluation, first)
                metrics.update({name: value for name, value in on_images.items() if name in own})
        return metrics

    def _repeat_last(self, evaluation: EvaluationCache, first: EvaluationPass) -> dict[str, float]:
        """Repeats the last evaluation from the other source and logs it; the store's metrics are named `_cached`.

        Callbacks that count evaluations are not told.

        Returns:
            The metrics of the pass on images, under the names that they have in `first`.
        """
        source = evaluation.second_source(first)
        if source is None:
            return {}
        prefix = f"{first.prefix}_cached" if isinstance(source, FromStore) else first.prefix
        second = self._evaluate_from(source, first, prefix)
        if first.from_store:
            from_store = cached_names(first.metrics, first.prefix)
            self.log(dict(from_store))
            on_images = second
        else:
            from_store, on_images = second, first.metrics
        evaluation.compare(on_images, from_store, first.prefix)
        return {name: value for name, value in on_images.items() if name in first.metrics}

    def _evaluate_from(self, source: EpochSource, first: EvaluationPass, prefix: str) -> dict[str, float]:
        """Runs an evaluation again from a source, and logs it as `Trainer.evaluate` does."""
        start = time.time()
        output = self._run_evaluation(source, first.loader, metric_key_prefix=prefix, **first.settings)
        steps = math.ceil(output.num_samples / (self.args.eval_batch_size * self.args.world_size))
        output.metrics.update(speed_metrics(prefix, start, num_samples=output.num_samples, num_steps=steps))
        self.log(output.metrics)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):
                callback.on_evaluate(self.args, self.state, self.control)  # closes its bar
        return output.metrics

    def get_eval_dataloader(self, *args, **kwargs) -> DataLoader:
        loader = super().get_eval_dataloader(*args, **kwargs)
        if self._session is not None and self._evaluation is not None:
            self._evaluation.prepare(loader)
            # A checkpoint may be written before the next step.
            self.current_flos += self._session.meter.take_build_flops()  # type: ignore[assignment]  # a float later
        return loader

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **kwargs,
    ):
        settings = {
            "description": description,
            "prediction_loss_only": prediction_loss_only,
            "ignore_keys": ignore_keys,
            **kwargs,
        }
        if self._session is None:
            return super().evaluation_loop(dataloader, metric_key_prefix=metric_key_prefix, **settings)
        source = self._session.evaluation_source(dataloader)
        output = self._run_evaluation(source, dataloader, metric_key_prefix=metric_key_prefix, **settings)
        if self._evaluation is not None:
            self._evaluation.record(EvaluationPass(dataloader, metric_key_prefix, settings, source, output.metrics))
        return output

    def _run_evaluation(self, source: EpochSource, dataloader: DataLoader, *args, **kwargs):
        if self._session is None:
            raise RuntimeError("an evaluation has a source only while a training runs.")
        with self._session.evaluating(dataloader, source) as book_samples:
            output = super().evaluation_loop(dataloader, *args, **kwargs)
            book_samples(output.num_samples or 0)
        return output

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs):
        if self._evaluation is None:
            return super().prediction_step(model, inputs, *args, **kwargs)
        with self._evaluation.prediction_step(inputs, force_eager=self.args.torch_compile) as step_inputs:
            return super().prediction_step(model, step_inputs, *args, **kwargs)

    # Checkpoints

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


def _follow_log_level(args: TrainingArguments) -> None:
    """Shows this package's informative messages where `Trainer` shows its own."""
    package, level = python_logging.getLogger(__name__.partition(".")[0]), args.get_process_log_level()
    if level > python_logging.INFO:
        return
    package.setLevel(level)
    if not package.handlers and not python_logging.getLogger().handlers:
        package.addHandler(python_logging.StreamHandler())
