"""`transformers.Trainer` with freezing, caching and replay: the rooms wired together."""

from __future__ import annotations

import contextlib
import logging as python_logging
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import speed_metrics
from transformers.utils import is_peft_available, logging

from .augment.mixing import Mixer, soft_cross_entropy
from .cache.rows import RowSource, check_dataset
from .cache.store import check_writable
from .config import FreezeCacheConfig
from .distributed import Group
from .model.checkpoint import has_weights, load_weights
from .model.layout import FeatureLayout
from .model.tracing import main_input_name
from .policies import FreezePolicy, LinearPolicy, ManualPolicy, NonePolicy
from .replay.collator import ReplayCollator, take_codes
from .replay.dataset import ReplayDataset
from .training.callback import FreezeCallback
from .training.evaluation import EvaluationCache
from .training.report import FreezeCacheReport, FreezeStatus, count_trainable, make_report
from .training.session import FreezeSession

logger = logging.get_logger(__name__)


class FreezeCacheTrainer(Trainer):
    """A drop-in `Trainer` that freezes settled blocks and replaces their forward pass by cached features.

    Takes the arguments of `Trainer` as they are, and two more. Samplers, collator, optimizer, schedule, evaluation and
    checkpoints stay those of `Trainer`.

    Args:
        freeze_cache: when to freeze and how features are kept. None means the defaults; then a training that cannot
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
        super().__init__(*args, **kwargs)
        self._mixer = self._make_mixer()
        _follow_log_level(self.args)
        self._freeze_callback = FreezeCallback(self._freeze_policy)
        if self._freezes:
            self.add_callback(self._freeze_callback)

    def freeze_status(self) -> FreezeStatus:
        """The cut, the frozen blocks and the store of the running or last training."""
        if self._session is not None:
            return self._session.status()
        return FreezeStatus(0, [], count_trainable(self.model), replaying=False, store_path=None, store_bytes=0)

    def freeze_cache_report(self) -> FreezeCacheReport:
        """What the running or last training has cost, by phase."""
        return make_report([], None) if self._session is None else self._session.report()

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

    def _inner_training_loop(
        self, batch_size=None, args=None, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None
    ):
        # Also entered again by `auto_find_batch_size` after it ran out of memory.
        if self._session is not None:
            self._session.close()
            self._session = None
        self._fell_back, self._starting = False, True
        self._freeze_callback.attach(None)
        try:
            return super()._inner_training_loop(
                batch_size=batch_size,
                args=args,
                resume_from_checkpoint=resume_from_checkpoint,
                trial=trial,
                ignore_keys_for_eval=ignore_keys_for_eval,
            )
        finally:
            if self._session is not None:
                self._session.stop()

    @property
    def _freezes(self) -> bool:
        return not isinstance(self._freeze_policy, NonePolicy)

    def _start_session(self, dataset: Any, collator: Callable) -> FreezeSession | None:
        group = Group(self.accelerator.process_index, self.accelerator.num_processes)
        try:
            session = group.on_all(lambda: self._make_session(dataset, collator, group))
        except Exception as error:  # under the defaults nothing that plain `Trainer` can do may fail
            self._cannot_freeze(error)
            return None
        if not session.can_cache:
            logger.warning("Several GPUs in one process: blocks are frozen, but not cached. Use `accelerate launch`.")
        if self.args.torch_compile:
            logger.warning("torch_compile: live epochs run compiled, replay epochs do not.")
        return session

    def _make_session(self, dataset: Any, collator: Callable, group: Group) -> FreezeSession:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("freezing and caching do not work under FSDP or DeepSpeed; use DDP (accelerate launch).")
        check_dataset(dataset)
        if self._freeze_config.cache != "never":
            check_writable(self._feature_cache_dir)
        session = FreezeSession(
            model=self.model,
            source=self._row_source(dataset, collator),
            config=self._freeze_config,
            explicit=self._freeze_explicit,
            cache_dir=self._feature_cache_dir,
            group=group,
            to_device=self._prepare_inputs,
            label_names=self.label_names,
            precision=f"{self.accelerator.mixed_precision}/{next(self.model.parameters()).dtype}",
            disable_tqdm=self.args.disable_tqdm,
            can_cache=self.args.n_gpu <= 1,
            evaluates_on_images=self._why_on_images(),
        )
        self._freeze_policy.start(len(session.chain))
        return session

    def _why_on_images(self) -> str | None:
        """Why evaluations cannot be from a store; None if they can."""
        if "inputs" in self.args.include_for_metrics:
            return "include_for_metrics asks for the inputs"
        if getattr(self.args, "predict_with_generate", False):
            return "predict_with_generate"
        others = [cls for cls in type(self).__mro__ if cls not in (FreezeCacheTrainer, Trainer)]
        if any("prediction_step" in vars(cls) for cls in others):
            return f"`{type(self).__name__}.prediction_step` is overridden"
        return None

    def _cannot_freeze(self, error: Exception) -> None:
        """Raises under explicit settings; the defaults fall back to plain training."""
        if self._freeze_explicit:
            raise error
        self._fell_back = True
        logger.warning(f"Nothing is frozen or cached, this is plain training: {error}")

    @property
    def _feature_cache_dir(self) -> Path:
        configured = self._freeze_config.feature_cache_dir
        return Path(configured) if configured is not None else Path(self.args.output_dir) / "_freeze_cache"

    def _row_source(self, dataset: Any, collator: Callable) -> RowSource:
        return RowSource(
            dataset,
            collator,
            batch_size=self._train_batch_size,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            num_workers=self.args.dataloader_num_workers,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
        )

    # Data: the source of the train loader's samples can turn to a store

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ) -> DataLoader:
        if not is_training and description == "Evaluation" and self._evaluation is not None:
            loader = self._get_eval_loader(dataset, description, batch_size, sampler_fn, dataloader_key)
            if loader is not None:
                return loader
        if not is_training or not self._freezes or not self._starting:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        self._starting = False  # a loader that is asked for besides is plain
        inner, collator = self._remove_columns(dataset, description)
        self._session = self._start_session(inner, collator)
        self._freeze_callback.attach(self._session)
        if self._session is None:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        if self._evaluation is not None:
            # Loaders of an earlier training or evaluation, kept for their workers, know nothing of this session.
            self.__dict__.pop("_eval_dataloaders", None)
        wrapped = ReplayDataset(inner, self._session.switch, self._session.source.seed)
        return self._get_replay_loader(
            wrapped, collator, description, batch_size, sampler_fn, is_training, dataloader_key
        )

    def _get_eval_loader(self, dataset, description, batch_size, sampler_fn, dataloader_key) -> DataLoader | None:
        """A loader whose samples can come from a store; None if they cannot."""
        own = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        inner, collator = self._remove_columns(dataset, description)
        is_own = any(dataset is one for one in own)
        wrapped = self._evaluation.wrap(dataset, inner, self.data_collator, collator, batch_size, is_own)
        if wrapped is None:
            return None
        return self._get_replay_loader(wrapped, collator, description, batch_size, sampler_fn, False, dataloader_key)

    def _remove_columns(self, dataset: Any, description: str) -> tuple[Any, Callable]:
        """The data set and the collator without the columns that the model does not take."""
        if isinstance(dataset, datasets.Dataset):
            return self._remove_unused_columns(dataset, description=description), self.data_collator
        return dataset, super()._get_collator_with_removed_columns(self.data_collator, description=description)

    def _get_replay_loader(
        self, wrapped: ReplayDataset, collator, description, batch_size, sampler_fn, is_training, dataloader_key
    ) -> DataLoader:
        users_collator, self.data_collator = self.data_collator, ReplayCollator(collator)
        try:
            return super()._get_dataloader(
                wrapped,
                description,
                batch_size,
                # Samplers see the user's data set: lengths and columns are read from it.
                None if sampler_fn is None else lambda _: sampler_fn(wrapped.inner),
                is_training,
                dataloader_key,
            )
        finally:
            self.data_collator = users_collator

    def _get_collator_with_removed_columns(self, data_collator: Callable, description: str | None = None) -> Callable:
        if isinstance(data_collator, ReplayCollator):
            return data_collator  # what is unused was removed before, where the user's data set is known
        return super()._get_collator_with_removed_columns(data_collator, description=description)

    # Optimizer and steps

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*([] if model is None else [model]))
        if self._session is not None and self._restored is not None:
            # After the optimizer has its groups, before its state is loaded and the model is wrapped.
            self._session.restore(self._restored["cut"], self._restored["session"])
            self._freeze_callback.restore(self._restored)
        return optimizer

    @property
    def _restored(self) -> Mapping[str, Any] | None:
        state = self.state.stateful_callbacks.get(FreezeCallback.__name__)
        return state["attributes"] if state and state["attributes"]["session"] else None

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        model, train_dataloader = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self._session is not None:
            self._session.prepared(self.optimizer, model)
        elif self._freezes and not self._fell_back:
            self._cannot_freeze(ValueError("`get_train_dataloader` is overridden and does not call `Trainer`'s."))
        return model, train_dataloader

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        if self._session is None:
            return super().training_step(model, self._mix(inputs), num_items_in_batch)
        with self._session.training_step(inputs, force_eager=self.args.torch_compile) as step_inputs:
            mixed = self._mix(step_inputs, self._session.layout_of(inputs))
            return super().training_step(model, mixed, num_items_in_batch)

    def _mix(self, inputs: Mapping[str, Any], layout: FeatureLayout | None = None) -> Mapping[str, Any]:
        """Mixes images of a live batch, or features of a replayed one."""
        if self._mixer is None:
            return inputs
        return self._mixer(self._prepare_inputs(inputs), main_input_name(self.model), layout=layout)

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        if self._session is not None:
            self._session.before_forward()
        return super().compute_loss_context_manager()

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        if self._session is None:
            return super().floating_point_ops(inputs)
        return self._session.step_flops(inputs) + self._session.take_build_flops()

    def _track_num_input_tokens(self, inputs) -> None:
        if take_codes(inputs) is None:  # codes are no tokens, and a warning in every step helps nobody
            super()._track_num_input_tokens(inputs)

    # Evaluation

    @property
    def _evaluation(self) -> EvaluationCache | None:
        return None if self._session is None else self._session.evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        run = partial(super().evaluate, ignore_keys=ignore_keys)
        if self._evaluation is None:
            return run(eval_dataset, metric_key_prefix=metric_key_prefix)
        state, several = self.state, eval_dataset is None and isinstance(self.eval_dataset, dict)
        return self._evaluation.evaluate(
            self.eval_dataset if several else eval_dataset,
            metric_key_prefix,
            evaluate=lambda dataset, prefix: run(None if several else dataset, metric_key_prefix=prefix),
            again=partial(self._evaluate_again, ignore_keys),
            is_last=lambda: state.global_step >= state.max_steps or self.control.should_training_stop,
            log_history=state.log_history,
        )

    def _evaluate_again(self, ignore_keys: list[str] | None, dataset: Any, prefix: str) -> dict[str, float]:
        """Evaluates and logs; callbacks that count evaluations are not told."""
        loader = self.get_eval_dataloader(dataset)
        if not self._evaluation.wants_images and not self._evaluation.replays(loader):
            return {}
        start = time.time()
        only_loss = True if self.compute_metrics is None else None
        output = self.evaluation_loop(loader, "Evaluation", only_loss, ignore_keys, prefix)
        steps = math.ceil(output.num_samples / (self.args.eval_batch_size * self.args.world_size))
        output.metrics.update(speed_metrics(prefix, start, num_samples=output.num_samples, num_steps=steps))
        self.log(output.metrics)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):
                callback.on_evaluate(self.args, self.state, self.control)  # closes its bar
        return output.metrics

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        loader = super().get_eval_dataloader(eval_dataset)
        if self._evaluation is not None:
            self._session.prepare_evaluation(loader)
            self.current_flos += self._session.take_build_flops()  # a checkpoint may be written before the next step
        return loader

    def evaluation_loop(self, dataloader: DataLoader, *args, **kwargs):
        if self._session is None:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        with self._session.evaluation_loop(dataloader) as book_samples:
            output = super().evaluation_loop(dataloader, *args, **kwargs)
            book_samples(output.num_samples)
        return output

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys=None):
        if self._evaluation is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with self._evaluation.prediction_step(inputs, force_eager=self.args.torch_compile) as step_inputs:
            return super().prediction_step(model, step_inputs, prediction_loss_only, ignore_keys)

    # Checkpoints

    def _load_callback_state(self) -> None:
        # Restored by `create_optimizer`; `Trainer` would put an unattached callback in its place.
        ours = self.state.stateful_callbacks.pop(FreezeCallback.__name__, None)
        super()._load_callback_state()
        if ours is not None:
            self.state.stateful_callbacks[FreezeCallback.__name__] = ours
        elif self._freezes:
            self.state.stateful_callbacks[FreezeCallback.__name__] = self._freeze_callback.state()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._loads_strictly(resume_from_checkpoint):
            logger.info(f"Loading model from {resume_from_checkpoint}.")
            load_weights(self.model if model is None else model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        checkpoint = self.state.best_model_checkpoint
        if self._loads_strictly(checkpoint):
            logger.info(f"Loading best model from {checkpoint} (score: {self.state.best_metric}).")
            load_weights(self.model, checkpoint)
        else:
            super()._load_best_model()

    def _loads_strictly(self, checkpoint: str) -> bool:
        """Whole models in one process's memory; adapters and sharded wrappers are loaded by `Trainer`."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not has_weights(checkpoint):
            return False
        if not is_peft_available():
            return True
        from peft import PeftModel

        return not isinstance(self.accelerator.unwrap_model(self.model), PeftModel)


def _follow_log_level(args: TrainingArguments) -> None:
    """Shows this package's informative messages where `Trainer` shows its own."""
    package, level = python_logging.getLogger(__package__), args.get_process_log_level()
    if level > python_logging.INFO:
        return
    package.setLevel(level)
    if not package.handlers and not python_logging.getLogger().handlers:
        package.addHandler(python_logging.StreamHandler())


def make_policy(config: FreezeCacheConfig) -> FreezePolicy:
    """The policy that the settings name."""
    if config.policy == "none":
        return NonePolicy()
    if config.policy == "manual":
        return ManualPolicy(config.freeze_points)
    return LinearPolicy(config.freeze_start, config.freeze_end, config.max_frozen, config.freeze_stages)
