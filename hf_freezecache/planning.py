"""`plan`: what every cut of a model would cost and save on a data set, before anything is written."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainingArguments
from transformers.utils import logging

from .augment.geometry import DENSE, PROJECTIVE
from .build.context import BuildContext
from .build.errors import OneWidthError
from .build.materialize import find_misfit
from .build.spec_maker import SpecMaker
from .build.store_spec import StoreSpec
from .build.survey import survey
from .cache.holdings import disk_limit
from .cache.rows import check_dataset
from .cache.view_columns import ViewSpec
from .config import FreezeCacheConfig
from .estimate.costs import Plan, PlanRow
from .estimate.probing import Prober
from .estimate.trial_steps import TrialSteps, timed
from .model.chain import BlockChain
from .model.modes import eval_mode, override_forward
from .model.tokens import blank_padding, token_mask
from .rng import preserve_rng
from .trainer import FreezeCacheTrainer, ZeroOrderTrainer
from .training.combining import find_combined
from .training.data_state import undisturbed
from .training.scope import store_directory
from .units import parse_bytes
from .zeroth_order.config import ZeroOrderConfig

logger = logging.get_logger(__name__)


def plan(
    model: nn.Module,
    dataset: Any,
    config: FreezeCacheConfig | None = None,
    *,
    args: TrainingArguments | None = None,
    data_collator: Callable | None = None,
    cuts: Sequence[int] | None = None,
    batches: int = 3,
    optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], Mapping[str, Any]] | None = None,
    zero_order: ZeroOrderConfig | None = None,
    **trainer_settings: Any,
) -> Plan:
    """Measures on a few batches what a store at every cut would take and what it would save.

    Goes the way of a `FreezeCacheTrainer` with the same arguments: columns, collator, batch size, mixed precision,
    loss and optimizer are those of the training. Model and random generators are left as they are; nothing is written
    but small stores in a temporary folder, which are removed.

    Args:
        model: as it would be trained.
        dataset: map-style, as the trainer gets it: transform set.
        config: the settings; the defaults if None.
        args: of the training; the defaults of `TrainingArguments` if None, but for a data set with a transform, whose
            columns are kept (`remove_unused_columns=False`).
        data_collator: the trainer's; its default if None.
        cuts: numbers of frozen blocks to look at; every one if None.
        batches: that are measured at each cut, after one to warm up; medians count.
        optimizer_cls_and_kwargs: the trainer's; what `args` name if None.
        zero_order: of a `ZeroOrderTrainer`, whose steps are measured without a backward pass; None: a
            `FreezeCacheTrainer`.
        trainer_settings: what else the trainer gets, e.g. `processing_class` or `compute_loss_func`.

    Raises:
        ValueError: if the data set cannot be cached, the model cannot be split or a cut does not exist.
    """
    config = FreezeCacheConfig() if config is None else config
    check_dataset(dataset)
    if batches < 1:
        raise ValueError(f"batches={batches!r} must be at least 1: something has to be measured.")
    if zero_order is not None:
        trainer_settings["zero_order"] = zero_order
    making = _trainer(model, dataset, config, args, data_collator, optimizer_cls_and_kwargs, trainer_settings)
    with undisturbed(dataset, data_collator), making as trainer:
        assert trainer.args.output_dir is not None  # the temporary folder: small builds are timed there
        context = replace(
            trainer.build_context(*trainer.without_unused_columns(dataset)),
            config=config,
            cache_dir=Path(trainer.args.output_dir),
        )
        numbers = _check_cuts(context.chain, cuts)
        steps = _trial_steps(trainer, context.chain)
        planner = _Planner(context, steps, lambda batch: trainer._prepare_inputs(dict(batch)), batches)
        budget = None if config.cache_budget is None else parse_bytes(config.cache_budget)
        limit = disk_limit(_store_directory(config, args), budget)
        bar = tqdm(numbers, desc="Planning", disable=trainer.args.disable_tqdm, leave=False)
        rows = [row for cut in bar if (row := planner.row(cut, limit)) is not None]
        if not rows:
            raise ValueError(next(iter(planner.left_out.values())))
        step, epoch = planner.plain(rows[0].cut)
        return Plan(tuple(rows), step, epoch, planner.describe_measurement())


class _Planner:
    """Measures cut by cut.

    Args:
        context: the training, with the user's settings.
        steps: how a training step is made.
        step_inputs: moves a collated batch to where the model is.
        batches: to measure.

    Attributes:
        left_out: by cut, why its features cannot be stored.
    """

    def __init__(
        self,
        context: BuildContext,
        steps: TrialSteps,
        step_inputs: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        batches: int,
    ):
        self.context, self.batches, self.steps, self.step_inputs = context, batches, steps, step_inputs
        self.left_out: dict[int, str] = {}
        self.chain, self.source, self.config = context.chain, context.source, context.config
        self.source.combined = find_combined(self.source)
        with preserve_rng():
            self.augmentation = survey(self.source, self.chain.main_input)
            if self.augmentation.declined is not None:
                raise ValueError(f"nothing can be cached: {self.augmentation.declined}.")
            self.probe = context.model_inputs(self.source.probe())
            self.chain.trace(self.probe)
        self.spec_maker = SpecMaker(context, self.augmentation)
        self.prober = Prober(context, steps, step_inputs)

    def row(self, cut: int, limit: int) -> PlanRow | None:
        """What a store at a cut would cost and save; None if its features cannot be stored."""
        # A build traces and proves the cut again, as mixed precision may have been set up meanwhile.
        _, fixed = timed(partial(self._prove_again, cut))
        if self._loss_reads_padding(cut):
            self.chain.padding.keep(cut, "the loss reads what is at padding")
        try:
            self.spec_maker.settle_padding(cut)
            spec = self._settle_geometry(self._draft(cut))
        except OneWidthError as error:
            self.left_out[cut] = str(error)
            return None
        costs = self.prober.measure(spec, self.batches, with_suffix=True)
        return self.prober.row(spec, replace(costs, fixed=costs.fixed + fixed), limit)

    def plain(self, cut: int) -> tuple[float, float]:
        """Seconds of a step and of an epoch with nothing frozen.

        Args:
            cut: any that can be stored.
        """
        spec = self._settle_geometry(self._draft(cut))
        return self.prober.plain(spec, self.batches)

    def describe_measurement(self) -> str:
        """What was measured, in words."""
        size, workers, views = self.source.batch_size, self.source.num_workers, self.config.views
        if not self.augmentation.random:
            augmentation = "nothing random to store views of"
        elif not views:
            augmentation = "no views: augmentation ends at the freeze point"
        elif self.augmentation.replayable:
            augmentation = f"{views} view{'s' if views > 1 else ''} beside the base view"
        else:
            augmentation = f"{views} whole view{'s' if views > 1 else ''} ({self.augmentation.why_not})"
        packed = "Rows are packed; their bytes are estimated from these batches. " if self.config.lossless else ""
        batches = "1 batch" if self.batches == 1 else f"{self.batches} batches"
        left_out = "".join(f" Not planned: {reason}" for reason in dict.fromkeys(self.left_out.values()))
        return (
            f"Measured on {self.context.device.type}: {batches} of {min(size, len(self.source))} of "
            f"{len(self.source):,} samples at every cut, {workers} loader processes; {augmentation}. {packed}"
            f"The speed of the disk was not measured.{left_out}"
        )

    def _loss_reads_padding(self, cut: int) -> bool:
        """Whether texts are stored with their padding, as the rehearsal of a training would find."""
        if not self.chain.padding.ignored(cut):
            return False
        model, main_input = self.chain.model, self.chain.main_input
        with preserve_rng(), torch.no_grad(), eval_mode(model):
            batch = dict(self.step_inputs(self.source.probe()))
            mask = token_mask(batch, main_input)
            assert mask is not None  # of texts
            features = blank_padding(self.chain.prefix(self.probe, cut), mask)
            whole = self.steps.loss(model, dict(batch))
            with self.chain.replay(cut, features, batch[main_input]):
                return not torch.allclose(whole, self.steps.loss(model, dict(batch)), rtol=1e-3, atol=1e-5)

    def _prove_again(self, cut: int) -> None:
        self.chain.trace(self.probe)
        self.chain.prove(self.probe, cut)

    def _draft(self, cut: int) -> StoreSpec:
        return self.spec_maker.draft(cut, self.config.codec_at(cut, len(self.chain)))

    def _settle_geometry(self, spec: StoreSpec) -> StoreSpec:
        """The spec with the kind of geometry that a build would end with, as far as the probed samples tell."""
        while not spec.views.whole:
            views = self.prober.load(spec, self.batches)
            if find_misfit(views, self.source.rows(0)) is None:
                break
            if spec.views.geometry == PROJECTIVE:
                spec = replace(spec, views=replace(spec.views, geometry=DENSE))
            else:
                spec = replace(spec, views=ViewSpec(spec.views.count))
        return spec


@contextlib.contextmanager
def _trainer(
    model: nn.Module,
    dataset: Any,
    config: FreezeCacheConfig,
    args: TrainingArguments | None,
    data_collator: Callable | None,
    optimizer: tuple[type, Mapping[str, Any]] | None,
    settings: Mapping[str, Any],
) -> Iterator[FreezeCacheTrainer]:
    """A trainer that writes nothing; the model runs under its mixed precision inside and is as it was after."""
    device = next(model.parameters()).device
    # Mixing is part of a step, and a small one; soft labels would need the mixer around the loss.
    quiet = replace(config, cache="never", cache_eval=False, mixup_alpha=0.0, cutmix_alpha=0.0)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(preserve_rng())
        if args is None:
            # A transform reads columns that no model takes; a training would have to keep them too.
            keep = getattr(dataset, "format", {}).get("type") == "custom"
            own = TrainingArguments(output_dir=folder, report_to="none", remove_unused_columns=not keep)
        else:
            own = copy.copy(args)
        own.output_dir, own.report_to, own.push_to_hub = folder, [], False
        trainer = (ZeroOrderTrainer if "zero_order" in settings else FreezeCacheTrainer)(
            model=model,
            args=own,
            train_dataset=dataset,
            data_collator=data_collator,
            optimizer_cls_and_kwargs=optimizer,
            freeze_cache=quiet,
            **settings,
        )
        stack.callback(lambda: None if next(model.parameters()).device == device else model.to(device))
        stack.enter_context(_checkpointing(model, own))
        accelerator = trainer.accelerator
        if accelerator.mixed_precision in ("fp16", "bf16"):

            def wrap(forward: Callable) -> Callable:
                def run(*inputs, **named):
                    with accelerator.autocast():
                        return forward(*inputs, **named)

                return convert_outputs_to_fp32(run)

            stack.enter_context(override_forward(model, wrap))
        yield trainer


@contextlib.contextmanager
def _checkpointing(model: nn.Module, args: TrainingArguments) -> Iterator[None]:
    """Activation checkpointing as the training would switch it on."""
    if not args.gradient_checkpointing or getattr(model, "is_gradient_checkpointing", False):
        yield
        return
    # To the type checker, what a module does not declare may be a tensor.
    kwargs = args.gradient_checkpointing_kwargs
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)  # type: ignore[operator]
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()  # type: ignore[operator]


def _trial_steps(trainer: FreezeCacheTrainer, chain: BlockChain) -> TrialSteps:
    """Training steps as the trainer makes them."""
    return TrialSteps(
        chain,
        # Without `return_outputs` it is the loss alone.
        loss=lambda model, inputs: cast(torch.Tensor, trainer.compute_loss(model, dict(inputs))),
        optimizer=trainer.make_trial_moves if isinstance(trainer, ZeroOrderTrainer) else _optimizer_of(trainer),
        max_grad_norm=trainer.args.max_grad_norm or 0.0,
        accumulation=trainer.args.gradient_accumulation_steps,
        forward_passes=trainer._forward_passes,
    )


def _optimizer_of(trainer: FreezeCacheTrainer) -> Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]:
    """What makes the trainer's optimizer for some parameters; AdamW where it takes more than parameters."""
    given = trainer.optimizer_cls_and_kwargs
    # Declared for the models of Transformers alone, as its own optimizers want it; those are not measured.
    kind, settings = given or trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)  # type: ignore[arg-type]
    simple = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    if not simple or {"params", "model", "optimizer_dict"} & set(settings):
        logger.info(f"Steps are measured with AdamW in place of {kind}, which is made from a whole model.")
        return torch.optim.AdamW
    return lambda parameters: kind(parameters, **settings)


def _check_cuts(chain: BlockChain, cuts: Sequence[int] | None) -> list[int]:
    if cuts is None:
        return list(range(1, len(chain) + 1))
    for cut in cuts:
        if isinstance(cut, bool) or not isinstance(cut, int) or not 1 <= cut <= len(chain):
            raise ValueError(
                f"cut {cut!r} cannot be planned: {type(chain.model).__name__} has {len(chain)} blocks (stem "
                f"included), so a cut is an integer from 1 to {len(chain)}."
            )
    if not cuts:
        raise ValueError(f"cuts is empty: name some from 1 to {len(chain)}, or leave it out for all.")
    return list(cuts)


def _store_directory(config: FreezeCacheConfig, args: TrainingArguments | None) -> Path:
    """The directory of the training's stores."""
    return store_directory(config, Path.cwd() if args is None or args.output_dir is None else args.output_dir)
