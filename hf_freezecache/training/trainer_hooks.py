"""The contract with `transformers.Trainer`: every override of it is here or in the two classes of hooks it inherits.

`tests/test_trainer_contract.py` compares the names, signatures and bodies that are used here with those of the
installed release.
"""

from __future__ import annotations

import contextlib
import logging as python_logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import datasets
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from ..augment.mixing import Mixer, soft_cross_entropy
from ..build.context import BuildContext
from ..build.several_sizes import use_common_size
from ..build.text_lengths import rows_by_length
from ..cache.holdings import Holdings
from ..cache.rows import RowSource, check_dataset, split_batch
from ..config import FreezeCacheConfig
from ..distributed import Announcer, count_operations, describe_error
from ..model.chain import BlockChain
from ..model.classifiers import ImageClassifier
from ..model.inputs import ModelInputs, main_input_name
from ..model.probes import check_own_checkpoints
from ..model.sharing import check_sharing
from ..model.tokens import TextInputs, token_mask
from ..policies import FreezePolicy
from ..replay.collator import ReplayCollator
from ..replay.dataset import ReplayDataset
from ..replay.requests import stamp_rows
from ..rng import preserve_rng
from .callback import FreezeCallback
from .checkpoint_hooks import CheckpointHooks
from .combining import settle_combining
from .data_state import undisturbed
from .epoch_source import StepInputs, live_shapes
from .evaluation import EvaluationCache, UsersLoader
from .evaluation_hooks import EvaluationHooks
from .hub_hooks import HubHooks
from .learning_rates import check_anneal
from .preconditions import UntrainedError, check_even, check_model, check_observable, check_trainable, check_trained
from .rehearsal_hooks import RehearsalHooks
from .report import FreezeCacheReport, FreezeStatus, count_trainable, make_report
from .report_hooks import ReportHooks
from .scope import Scope
from .session import FreezeSession
from .settings import read_settings
from .sharding import check_settings, describe_precision, place_whole, without_whole_model

logger = logging.get_logger(__name__)


class FreezeCacheMixin(EvaluationHooks, CheckpointHooks, RehearsalHooks, HubHooks, ReportHooks):
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
        freeze_cache, policy = self.__dict__.pop(_GIVEN, (freeze_cache, policy))
        self._freeze_explicit = freeze_cache is not None or policy is not None
        self._freeze_config, self._freeze_policy = read_settings(freeze_cache, policy)
        self._session = None
        self._why_plain = None
        self._earlier_stores: Holdings | None = None
        self._starting = False
        self._checkpoint_state, self._operations_before_loss = None, 0
        super().__init__(*args, **kwargs)
        self._check_hub_strategy()
        self._mixer = self._make_mixer()
        _follow_log_level(self.args)
        self._freeze_callback = FreezeCallback(self._freeze_policy)
        if self._is_active:
            self.add_callback(self._freeze_callback)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(FreezeCacheMixin)]
        # A trainer of somebody else that comes first takes its own arguments only: `class Mine(Seq2SeqTrainer,
        # FreezeCacheTrainer)`.
        if any("__init__" in vars(other) and not issubclass(other, FreezeCacheMixin) for other in before):
            cls.__init__ = _keep_settings(cls.__init__)  # type: ignore[method-assign]

    def freeze_status(self) -> FreezeStatus:
        """The cut, the frozen blocks and the store of the running or last training."""
        if self._session is not None:
            return self._session.status()
        # After a search for hyperparameters there is no model.
        trainable = 0 if self.model is None else count_trainable(self._own_model)
        return FreezeStatus(0, [], trainable, replaying=False, store_path=None, store_bytes=0)

    def freeze_cache_report(self) -> FreezeCacheReport:
        """What the running or last training has cost, by phase."""
        if self._session is not None:
            return self._session.report()
        plain = "policy='none'" if not self._is_active else self._why_plain
        return make_report([], None, "no training has run" if plain is None else f"plain training: {plain}")

    @property
    def freeze_settings(self) -> FreezeCacheConfig:
        """When blocks are frozen, and how features are kept."""
        return self._freeze_config

    def find_chain(self) -> BlockChain:
        """The model as blocks: those of the running or last training, else those that one would have.

        Raises:
            ValueError: if there is no training data to find them with, or the model cannot be split.
        """
        if self._session is not None:
            return self._session.chain
        if self.train_dataset is None:
            raise ValueError("the blocks of the model are found with a training batch: pass train_dataset.")
        return self.build_context(*self.without_unused_columns(self.train_dataset)).chain

    def build_context(self, dataset: Any, collator: Callable) -> BuildContext:
        """Model, samples and settings as stores of a training on a data set would be built from them.

        Args:
            dataset: as `without_unused_columns` returned it.
            collator: the same.

        Raises:
            ValueError: if the rows cannot be cached or the model cannot be split.
        """
        check_model(self, self._own_model, self._freeze_config)
        check_dataset(dataset)
        source = RowSource(
            dataset,
            collator,
            batch_size=self._train_batch_size,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            num_workers=self.args.dataloader_num_workers,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
        )
        trainer = weakref.proxy(self)  # see `_make_session`
        model_inputs = ModelInputs(self._own_model, lambda batch: trainer._inputs_by_name(batch), self.label_names)
        with preserve_rng():
            probe = self._draw_probe(source)
            main_input = main_input_name(self._own_model)
            if token_mask(probe, main_input) is not None:
                by_length = rows_by_length(source, main_input)
                if by_length is not None:  # the longest stands for all, and beside the shortest there is padding
                    source.probe_rows = [by_length[-1], by_length[0]][: len(source)]
                    probe = source.probe()
            elif self._freeze_config.cache != "never":
                split_batch(probe, main_input)  # a clear error before the model sees the batch
            model_inputs.include_labels_if_needed(probe)
            chain = BlockChain.from_model(self._own_model, self._freeze_config.blocks, probe=model_inputs(probe))
            check_own_checkpoints(self._own_model, model_inputs(probe))
            source.texts = TextInputs(main_input, chain.inputs_of(1))
            for sentence in check_sharing(chain):
                Announcer(self._group, logger).warning(sentence)
        return BuildContext(
            chain=chain,
            source=source,
            config=self._freeze_config,
            cache_dir=self._feature_cache_dir,
            group=self._group,
            model_inputs=model_inputs,
            precision=describe_precision(self),
            disable_tqdm=bool(self.args.disable_tqdm),
            eval_dataset=self.eval_dataset,
            forward_passes=self._forward_passes,
        )

    def _inputs_by_name(self, batch: Any) -> Mapping[str, Any]:
        if isinstance(batch, Mapping) and isinstance(batch.get(main_input_name(self._own_model)), torch.Tensor):
            return self._prepare_inputs(batch)  # type: ignore[arg-type]  # `ModelInputs` gives a dict
        return self._called_inputs(batch)  # frozen without features, a training may collate what it likes

    def _draw_probe(self, source: RowSource) -> Mapping[str, Any]:
        try:
            return source.probe()
        except KeyError as error:
            dropped = set(getattr(self.train_dataset, "column_names", None) or ()) - set(
                getattr(source.dataset, "column_names", None) or ()
            )
            if not self.args.remove_unused_columns or error.args[:1] == () or error.args[0] not in dropped:
                raise
            raise ValueError(
                f"the data set's transform reads the column {error.args[0]!r}, which a Trainer drops, as no argument "
                "of the model has this name: set remove_unused_columns=False in TrainingArguments."
            ) from error
        except Exception as error:  # whatever a collator raises about samples of several sizes
            if not use_common_size(source, main_input_name(self._own_model)):
                raise
            Announcer.survived(logger, "The first samples cannot be collated together", error)
            return source.probe()

    def without_unused_columns(self, dataset: Any, description: str = "training") -> tuple[Any, Callable]:
        """A data set and its collator without the columns that the model does not take."""
        if isinstance(dataset, datasets.Dataset):
            return self._remove_unused_columns(dataset, description=description), self.data_collator
        return dataset, super()._get_collator_with_removed_columns(self.data_collator, description=description)

    def _make_mixer(self) -> Mixer | None:
        config = self._freeze_config
        if not config.mixup_alpha and not config.cutmix_alpha:
            return None
        wrapped = self._own_model if isinstance(self._own_model, ImageClassifier) else None
        config_of_model = getattr(self._own_model, "config", None)
        classes = getattr(config_of_model, "num_labels", None) if wrapped is None else wrapped.num_classes
        if classes is None:
            raise ValueError(
                "mixup and cutmix make labels of probabilities: the model needs `config.num_labels`, or, if it is of "
                "timm or torchvision, `wrap_classifier`."
            )
        if type(self).compute_loss is not Trainer.compute_loss:
            logger.warning(
                f"Mixup and cutmix: `{type(self).__name__}.compute_loss` gets labels of probabilities (B, K). "
                "Compute the loss from the logits; what models compute from such labels is another loss."
            )
        if self.compute_loss_func is None and (wrapped is None or self.args.label_smoothing_factor):
            # The models' own losses take class numbers; a loss function of the user's gets the soft labels.
            self.compute_loss_func = partial(soft_cross_entropy, label_smoothing=self.args.label_smoothing_factor)
        return Mixer(config.mixup_alpha, config.cutmix_alpha, classes)

    # One training at a time

    def _inner_training_loop(self, *args, **kwargs):
        # Also entered again by `auto_find_batch_size` after it ran out of memory.
        if self._session is not None:
            self._session.close()
            # They count under the budget of the next training, a trial of a search for instance, which may use them.
            self._earlier_stores = self._session.keeper.provider.holdings
            self._session = None
        self._why_plain, self._starting = None, True
        self._checkpoint_state = None
        self._freeze_callback.attach(None)
        self._freeze_callback.was_untrained = False
        try:
            with self._recorded():
                return super()._inner_training_loop(*args, **kwargs)
        finally:
            if self._session is not None:
                self._session.stop()

    def _start_session(self, dataset: Any, collator: Callable) -> FreezeSession | None:
        try:
            self._scope = scope = self._find_scope()
            with undisturbed(dataset, collator):
                session = self._group.on_all(lambda: self._make_session(dataset, collator, scope))
            found = self._group.gather(session.chain.names)
            if any(names != found[0] for names in found):
                raise ValueError(f"the processes have found different blocks: {found}. Name them with blocks=[...].")
        except Exception as error:  # under the defaults nothing that plain `Trainer` can do may fail
            self._cannot_freeze(error)
            return None
        if scope.is_blind:
            Announcer(self._group, logger).warning(f"Blocks are frozen, but nothing is cached: {scope.why_not}")
        if self.args.n_gpu > 1:
            logger.warning("Several GPUs in one process: blocks are frozen, but not cached. Use `accelerate launch`.")
        if self._runs_compiled:
            logger.warning("Compiled model: live epochs run compiled, builds and replay epochs do not.")
        return session

    def _make_session(self, dataset: Any, collator: Callable, scope: Scope) -> FreezeSession:
        # Before any data is touched.
        check_observable(self, self._freeze_policy)
        blocks = check_model(self, self._own_model, self._freeze_config)
        check_settings(self, self._freeze_config, self._freeze_policy)
        if not self._freeze_explicit:
            check_trained(self._own_model)
        if blocks is not None:
            self._freeze_policy.start(len(blocks))
        place_whole(self)
        context = without_whole_model(self, scope.of(self.build_context(dataset, collator)))
        settle_combining(context.source, self._group, self._freeze_config.cache != "never")
        if blocks is None:
            self._freeze_policy.start(len(context.chain))
        # Not in a cycle with the trainer: one that is dropped goes at once, as a `Trainer` does. In garbage collection
        # it would take its loaders' queues before their processes, for whose end torch then waits five seconds each.
        trainer = weakref.proxy(self)
        session = FreezeSession(
            context,
            self._freeze_explicit,
            lambda names: trainer._rehearsing(names),
            self._suspects(),
            scope.why_not,
            self._why_on_images(),
            is_compiled=lambda: trainer._runs_compiled,
            is_last=lambda: (
                trainer.state.global_step >= trainer.state.max_steps or trainer.control.should_training_stop
            ),
            batches_per_step=self.args.gradient_accumulation_steps,
        )
        session.meter.forward_passes = self._forward_passes
        if self.is_fsdp_enabled:
            session.meter.measure_ahead()
        self._begin_record(session)
        check_anneal(self._freeze_policy, self._freeze_config, session.num_blocks)
        # The cuts of a schedule do not depend on the number of epochs.
        for _, cut in self._freeze_policy.changes(session.num_blocks, 1) or ():
            check_trainable(session.chain, cut)
        if self._earlier_stores is not None:
            session.keeper.provider.holdings.inherit(self._earlier_stores)
        return session

    def _cannot_freeze(self, error: Exception) -> None:
        """Raises under explicit settings; the defaults fall back to plain training."""
        if self._freeze_explicit:
            raise error
        self._why_plain = describe_error(error)
        self._freeze_callback.was_untrained = isinstance(error, UntrainedError)
        Announcer(self._group, logger).failure("Nothing is frozen or cached, this is plain training", error)

    # Data: the source of the train loader's samples can turn to a store

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ) -> DataLoader:
        settings = dict(sampler_fn=sampler_fn, is_training=is_training, dataloader_key=dataloader_key)
        if not is_training and description == "Evaluation" and self._evaluation is not None:
            loader = self._get_eval_loader(self._evaluation, dataset, description, batch_size, settings)
            if loader is not None:
                return loader
        if not is_training or not self._is_active or not self._starting:
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
        session = self._session
        source = session.context.source
        wrapped = ReplayDataset(inner, session.switch, source.seed, source.texts, together=bool(source.combined))
        loader = self._get_replay_loader(wrapped, collator, description, batch_size, settings)
        try:
            check_even(loader)
            self._scope.deal(session, loader)
        except ValueError as error:
            self._cannot_freeze(error)
            self._session = None
            self._freeze_callback.attach(None)
            return super()._get_dataloader(dataset, description, batch_size, **settings)
        session.loader = loader
        session.shared = (self, self.model, self.accelerator, dataset, inner)
        return loader

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
            loader = super()._get_dataloader(wrapped, description, batch_size, **settings)
        finally:
            self.data_collator = users_collator
        assert wrapped.switch is not None  # it was made in this process
        stamp_rows(loader, wrapped.switch)
        # A loader without processes of its own would copy every batch there once more.
        wrapped.pinned = loader.pin_memory and not loader.num_workers and torch.cuda.is_available()
        return loader

    def get_batch_samples(self, epoch_iterator, *args, **kwargs):
        if self._session is None:
            return super().get_batch_samples(epoch_iterator, *args, **kwargs)
        # The training's own iteration over the loader begins here.
        with self._session.switch.requesting():
            return super().get_batch_samples(self._session.readable(epoch_iterator), *args, **kwargs)

    def _get_collator_with_removed_columns(self, data_collator: Callable, description: str | None = None) -> Callable:
        if isinstance(data_collator, ReplayCollator):
            return data_collator  # unused columns were removed before, where the user's data set is known
        return super()._get_collator_with_removed_columns(data_collator, description=description)

    # Optimizer and steps

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        # After the optimizer has its groups, before its state is loaded and the model is wrapped.
        self._take_checkpoint_state()
        return optimizer

    def _take_checkpoint_state(self) -> None:
        if self._session is not None and self._checkpoint_state is not None:
            self._session.load_state_dict(self._checkpoint_state["cut"], self._checkpoint_state["session"])
            self._freeze_callback.load_state_dict(self._checkpoint_state)
            self._checkpoint_state = None

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        model, train_dataloader = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self._session is not None:
            self._session.optimizer = self.optimizer
            self._take_checkpoint_state()  # a `create_optimizer` of the user's need not call this class's
            self._session.prepared(self.optimizer, model)
        elif self._is_active and self._why_plain is None:
            self._cannot_freeze(ValueError("`get_train_dataloader` is overridden and does not call `Trainer`'s."))
        return model, train_dataloader

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs) -> torch.Tensor:
        step = super().training_step
        if self._session is None:
            return step(model, self._mix(StepInputs(inputs, 0)).inputs, *args, **kwargs)
        return self._session.training_step(inputs, self._mix, lambda inputs: step(model, inputs, *args, **kwargs))

    def _mix(self, step: StepInputs) -> StepInputs:
        """Mixes images of a live batch, or features of a replayed one."""
        if self._mixer is None:
            return step
        name, inputs = main_input_name(self._own_model), self._prepare_inputs(step.inputs)
        session = self._session
        if session is not None and (session.proof.rehearsal.is_running or session.head_start.is_running):
            return replace(step, inputs=self._mixer.unmixed(inputs))  # images are not mixed as features are
        if step.features is None:
            return replace(step, inputs=self._mixer(inputs, name))
        mixed = self._mixer({**inputs, name: step.features}, name, layout=step.layout)
        return replace(step, features=mixed[name], inputs={**mixed, name: inputs[name]})

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        stack = super().compute_loss_context_manager()
        if self._session is not None:
            stack.enter_context(self._session.forward_modes())
        self._operations_before_loss = count_operations()
        return stack

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:  # type: ignore[override]  # `Trainer` adds floats
        return super().floating_point_ops(inputs) if self._session is None else self._session.step_flops()

    def _track_num_input_tokens(self, inputs) -> None:
        # A batch of codes counts as the live batch of the same samples.
        if self._session is not None and self.args.include_num_input_tokens_seen != "no":
            inputs = live_shapes(self._session.chain, inputs)
        super()._track_num_input_tokens(inputs)


_GIVEN = "_freeze_given"


def _keep_settings(init: Callable) -> Callable:
    """An `__init__` that keeps this package's arguments for the mixin; what it calls does not know them."""

    @wraps(init)
    def keep(self, *args, freeze_cache=None, policy=None, **kwargs):
        if freeze_cache is not None or policy is not None:
            vars(self)[_GIVEN] = (freeze_cache, policy)
        init(self, *args, **kwargs)

    return keep


def _follow_log_level(args: TrainingArguments) -> None:
    """Shows this package's informative messages where `Trainer` shows its own; hides none that are shown already."""
    package, level = python_logging.getLogger(__name__.partition(".")[0]), args.get_process_log_level()
    if level > python_logging.INFO:
        return
    package.setLevel(min(level, package.getEffectiveLevel()))
    if not package.handlers and not python_logging.getLogger().handlers:
        package.addHandler(python_logging.StreamHandler())
