"""One training from `train()` to its end: it freezes, holds the source of the batches, and books what things cost."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..augment.mixing import add_noise
from ..build.context import BuildContext
from ..build.spec_maker import SpecMaker
from ..cache.manifest import StoreError
from ..cache.store import FeatureStore
from ..distributed import Announcer, rewrap_ddp
from ..model.stand_ins import FrozenOutputError
from ..policies import Choice, ComingFreeze, Moment, ObservedBlock
from ..replay.collator import take_lost
from ..replay.dataset import live_batch
from ..replay.requests import SourceSwitch
from ..rng import preserve_rng
from . import before_steps
from .accounting import Accounts
from .announcements import describe_other_rates
from .data_state import looking_at
from .epoch_source import EpochSource, FromImages, FromStore, StepInputs, bypassing, load_source
from .evaluation import EvaluationCache
from .findings import Findings
from .freezing_trial import FreezingTrial
from .head_start import HeadStart
from .journal import Journal
from .learning_rates import LearningRates
from .offloading import Offloading
from .preconditions import check_trainable
from .proof import MismatchError, Proof
from .recorder import BlockRecorder
from .rehearsal import Rehearsal, Rehearsing
from .report import FreezeCacheReport, FreezeStatus, epoch_numbers, make_report
from .sharding import reshard
from .shards import Shards
from .similarities import SampleSimilarities
from .step_state import StepState
from .store_keeper import StoreKeeper
from .store_provider import StoreProvider

logger = logging.get_logger(__name__)


class FreezeSession:
    """The state of one training.

    Args:
        context: model, samples and settings.
        explicit: whether the user gave the settings.
        rehearsing: makes a context in which the trainer's own steps run without any update.
        suspects: what users have put in the path of the loss, for messages.
        why_not_cached: why nothing can be cached in this training; None if it can.
        why_on_images: why evaluations cannot be cached; None if they can.
        is_compiled: whether steps run compiled code, as far as is known.
        is_last: whether the training ends with this step, as far as is known.
        batches_per_step: batches that an optimizer step of this process takes.

    Attributes:
        source: where the batches of the running epoch come from.
        choice: what the rule has chosen for this training; None if it has nothing to choose.
        evaluation: stores of the evaluation sets; None where evaluations run on samples, and after the training.
        loader: of the training, as `Trainer` made it.
        iterated: the loader that the training iterates over: this one, or one that the user has made of it.
        shared: what objects of the user's may refer to and nobody copies: the trainer, the model. Until the data is
            checked: the trainer refers to its session.
    """

    def __init__(
        self,
        context: BuildContext,
        explicit: bool,
        rehearsing: Rehearsing,
        suspects: Sequence[str] = (),
        why_not_cached: str | None = None,
        why_on_images: str | None = None,
        is_compiled: Callable[[], bool] = lambda: False,
        is_last: Callable[[], bool] = lambda: False,
        batches_per_step: int = 1,
    ):
        self.chain, self.config, self.group = context.chain, context.config, context.group
        self.announcer = Announcer(self.group, logger)
        with preserve_rng():
            self.accounts = Accounts(self.chain, context.model_inputs(context.source.probe()))
        self.ledger, self.meter = self.accounts.ledger, self.accounts.meter
        self.context = replace(context, count_run=self.meter.count_run)
        spec_maker = SpecMaker(self.context)
        provider = StoreProvider(spec_maker)
        self.keeper = StoreKeeper(provider, self.accounts, explicit, why_not_cached)
        self.explicit, self._is_compiled = explicit, is_compiled
        self.shards = Shards(self.chain, context.is_split, self.group, self.decline)
        self.proof = Proof(self.context, Rehearsal(self.context, rehearsing, suspects), self.shards.whole)
        self.head_start = HeadStart(self.context, rehearsing, self.meter.see, provider.budget.room)
        self.trial = FreezingTrial(self.context, rehearsing, self.proof.rehearsal, self.meter.see, batches_per_step)
        similarities = SampleSimilarities(self.context, self.accounts.book_samples, batches_per_step)
        self.recorder, self.journal = BlockRecorder(self.chain, similarities), Journal()
        self.learning_rates = LearningRates(self.chain, self.config) if self.config.changes_learning_rates else None
        self.switch = SourceSwitch(len(context.source))
        self.offloading = Offloading(self.chain, self.announcer, self.config.offload_frozen)
        self.source: EpochSource = FromImages()
        self.choice: Choice | None = None
        self.loader: Any = None
        self.iterated: Any = None
        self.shared: Sequence[Any] = ()
        self.evaluation: EvaluationCache | None = None
        if self.config.cache_eval:
            reason = why_not_cached if why_on_images is None else why_on_images
            if reason is None:
                self.evaluation = EvaluationCache(spec_maker, provider.holdings, self.accounts, is_last)
            else:
                self.announcer.warning(f"cache_eval: evaluations during training run on samples ({reason}).")
        self.optimizer: Any = None
        self.wrapped_model: nn.Module = context.model
        # Whether steps of this epoch on features run compiled code uncompiled: it would run the bypassed blocks.
        self.force_eager = False
        self._live_buffers: list[torch.Tensor] = []
        self._parameters: list[nn.Parameter] = []
        self.findings = Findings(self.group, context.device)
        # Mode and samples of the last micro-batch.
        self._last_step: tuple[str, float] | None = None

    # Epochs: what the callback calls

    @property
    def num_blocks(self) -> int:
        return len(self.chain)

    @property
    def batches(self) -> int:
        """Batches of an epoch, by the loader that `Trainer` has made."""
        return len(self.loader)

    def broadcast(self, value: Any) -> Any:
        return self.group.broadcast(value)

    def announce(self, message: str) -> None:
        self.announcer.warning_once(message)

    def expect(self, coming: Sequence[ComingFreeze] | None, moment: Moment, steps_per_epoch: int) -> None:
        self.recorder.steps_per_epoch = steps_per_epoch
        if self.learning_rates is not None:
            self.learning_rates.expect(self.group.broadcast(coming) or (), moment, steps_per_epoch)
            self.announce(self.learning_rates.describe())

    def begin_step(self, step: int) -> None:
        self.recorder.step = step
        if self.learning_rates is not None:
            self.learning_rates.begin_step(step)

    def begin_epoch(self, moment: Moment, epochs_left: float) -> None:
        """Brings the cut to `moment.cut`, then the source: a store where one pays, samples otherwise."""
        self.offloading.bring_back()
        self.ledger.end_all()
        self._share_problems()  # they belong to the epoch before
        self.switch.epoch = moment.epoch
        if self.chain.cut == 0:
            self.meter.per_sample("live")  # the cost of plain training, for the report
        if moment.cut > self.chain.cut:
            check_trainable(self.chain, moment.cut)
            self._freeze(moment.cut)
            rewrap_ddp(self.wrapped_model)
            self.announcer.info(
                f"Epoch {moment.epoch}: froze {moment.cut} of {len(self.chain)} blocks, up to "
                f"'{self.chain.names[moment.cut - 1]}'."
            )
        with looking_at(self.context.source):
            with self.shards.whole(self._may_store(moment.cut) and self.source.cut != moment.cut):
                self.source = self.keeper.without_measuring(moment.cut, epochs_left, self.source)
            self._check_prefix(moment.cut)
            with self.shards.whole(self._may_store(moment.cut)):
                self.source = self.keeper.next(moment.cut, epochs_left, self.source, moment.epoch)
                self._check_rows(moment.epoch)
                self.findings.concern_the_step = self.shards.is_split and isinstance(self.source, FromStore)
                if self.findings.concern_the_step:
                    self.meter.per_sample(self.source.mode)  # not in a step
        if self.head_start.is_due:
            before_steps.give_head_start(self, self.store)
        self.source.turn(self.switch)
        self.force_eager = self._is_compiled()
        frozen = set(map(id, self.chain.prefix_buffers(self.chain.cut).values()))
        self._live_buffers = [buffer for buffer in self.context.model.buffers() if id(buffer) not in frozen]
        self._parameters = list(self.context.model.parameters())
        phase = self.accounts.begin_epoch(self.chain.cut, self.source.mode)
        if self.source.store_bytes:
            phase.store_bytes = self.source.store_bytes
        self.journal.begin_epoch(moment.epoch, self.chain.cut, self.source.mode, self.source.store_bytes)

    def end_epoch(self) -> None:
        if self.ledger.current is not None:
            self.ledger.current.epochs += 1
            self.accounts.end_epoch()
        self._share_problems()  # the last epoch has no beginning after it

    def end_step(self) -> None:
        if self.ledger.current is not None:
            self.ledger.current.steps += 1
            self.ledger.sample_memory()
            self.journal.end_step()

    def watch(self, signals: frozenset[str]) -> None:
        self.recorder.watch(signals, self._is_compiled())

    def observed_blocks(self) -> list[ObservedBlock]:
        return self.recorder.blocks()

    def state_dict(self) -> dict[str, Any]:
        self._check_files()  # a resumed training does as this one, which has not met the loss of a store yet
        rates = {} if self.learning_rates is None else {"learning_rates": self.learning_rates.settings}
        return {
            "blocks": self.chain.names,
            "source": self.source.state_dict(),
            "stores": self.keeper.state_dict(),
            "phases": self.ledger.state_dict(),
            "flops": self.meter.state_dict(),
            "journal": self.journal.state_dict(),
            **rates,
        }

    # The training: what the trainer calls

    def load_state_dict(self, cut: int, state: Mapping[str, Any]) -> None:
        """Continues a training from a checkpoint: freezes what was frozen there. Called on a resume only.

        Raises:
            ValueError: if the model has other blocks now, so that cuts mean something else.
        """
        before = state.get("blocks")  # checkpoints of declared families alone did not have them
        if cut and before is not None and before != self.chain.names:
            raise ValueError(
                f"the checkpoint has frozen {cut} of {len(before)} blocks, up to '{before[cut - 1]}'; the model has "
                f"other blocks now, {len(self.chain)} from '{self.chain.names[0]}' to '{self.chain.names[-1]}'. Go on "
                f"with the model, the data and the versions of before, or name the blocks of before: blocks={before}."
            )
        now = None if self.learning_rates is None else self.learning_rates.settings
        if (other := describe_other_rates(state.get("learning_rates"), now)) is not None:
            self.announce(other)
        self.source = load_source(state["source"])
        self.keeper.load_state_dict(state["stores"], cut)
        self.ledger.load_state_dict(state["phases"])
        self.meter.load_state_dict(state["flops"])
        self.journal.load_state_dict(state.get("journal"))
        if cut:
            self._freeze(cut)

    def prepared(self, optimizer: Any, wrapped_model: nn.Module) -> None:
        """Takes optimizer and model as accelerate has wrapped them."""
        self.optimizer, self.wrapped_model = optimizer, wrapped_model
        if self.chain.cut:
            rewrap_ddp(wrapped_model)  # a wrapper kept from an earlier training does not know of this freeze
        if self.learning_rates is not None:
            self.group.on_all(partial(self.learning_rates.attach, optimizer))

    def stop(self) -> None:
        """The training has ended or broken off; status and report stay."""
        self.ledger.end_all()
        if self.learning_rates is not None:
            self.learning_rates.detach()
        if self.evaluation is not None:
            self.evaluation.stop()
            self.evaluation = None
        for each in (self.source, self.recorder, self.offloading):
            each.close()

    def close(self) -> None:
        """Makes room for another training: every parameter gets back the `requires_grad` that the user had set."""
        self.stop()
        reshard(self.context.model)
        self.chain.unfreeze()
        rewrap_ddp(self.wrapped_model)  # `Trainer` keeps the wrapper for the next training

    def training_step(
        self,
        batch: dict[str, Any],
        mix: Callable[[StepInputs], StepInputs],
        run: Callable[[dict[str, Any]], torch.Tensor],
    ) -> torch.Tensor:
        """Runs one training step; on features where the batch is from a store, and they are valid.

        A step that needs what only samples have is run again on the samples of its rows, and so are the later ones.

        Args:
            batch: as the loader returned it.
            mix: mixes the rows of a step (mixup, cutmix).
            run: the trainer's step on model inputs.

        Raises:
            MismatchError: under `on_mismatch="error"`, if the features are not those of the training any more; or if
                a step that needs what only samples have cannot be run again.
        """
        if self.proof.rehearsal.is_running:
            step = mix(self.proof.rehearsal.step_inputs(batch))
            with bypassing(self.chain, step, self.force_eager):
                return run(step.inputs)
        if self.head_start.is_running:
            with self.head_start.bypassing(batch) as inputs:
                return run(mix(StepInputs(inputs, 0)).inputs)
        if isinstance(self.source, FromStore):
            self._fall_back(self.proof.at_step(), alone=True)
        source = self.source if self.keeper.mismatch is None else FromImages(self.chain.cut)
        step = source.step_inputs(batch, self.context)
        if self.findings.before_step(not step.bypassed):
            self._share_problems()
            self.findings.concern_the_step = self.store is not None
            step = FromImages(self.chain.cut).step_inputs(batch, self.context)
        if not step.bypassed:
            return self._run(step, mix, run)
        state = StepState(self.wrapped_model, self._live_buffers, self._parameters, self.group)
        try:
            with state.recording():
                return self._run(step, mix, run)
        except FrozenOutputError as error:
            self.shards.check_repeatable(error)
            state.check_repeatable(error)
            self._fall_back(str(error), alone=True)
        with state.repeating():
            return self._run(FromImages(self.chain.cut).step_inputs(batch, self.context), mix, run)

    def _run(
        self,
        step: StepInputs,
        mix: Callable[[StepInputs], StepInputs],
        run: Callable[[dict[str, Any]], torch.Tensor],
    ) -> torch.Tensor:
        if step.features is not None and self.config.feature_noise:
            step = replace(step, features=add_noise(step.features, self.config.feature_noise))
        step = mix(step)
        samples = step.samples * self.meter.relative(self.meter.width_of(step.inputs))
        self.offloading.hold(0 if self.force_eager else step.bypassed)  # compiled code keeps addresses
        self._last_step, self.recorder.active = (step.mode, samples), True
        try:
            with self.shards.leaving_out(step.bypassed), bypassing(self.chain, step, self.force_eager):
                return run(step.inputs)
        finally:
            self.recorder.active = False

    @contextlib.contextmanager
    def forward_modes(self) -> Iterator[None]:
        """Inside, after `model.train()`, everything before the cut runs in eval mode."""
        if not self.chain.cut or not self.context.model.training or self.head_start.is_running:
            yield
            return
        self.chain.eval_prefix()
        # Compiled code would be compiled again for every step.
        with contextlib.nullcontext() if self.force_eager else self.chain.frozen_modes():
            yield

    # Proof: what is not valid any more is not used any more

    try_freezing, plan_head_start = before_steps.try_freezing, before_steps.plan_head_start
    rehearse, check_data = before_steps.rehearse, before_steps.check_data

    def _check_prefix(self, cut: int) -> None:
        if self._may_store(cut):
            with self.shards.whole():
                declined = self.decline_data()
            if not declined:
                self._fall_back(self.proof.of_prefix(cut))

    def _may_store(self, cut: int) -> bool:
        """Whether the epoch that begins may read features, as far as is known: its store may have to be made."""
        source = self.source
        stays_on_images = isinstance(source, FromImages) and source.cut == cut and source.lasts(self.switch.epoch)
        return cut > 0 and self.keeper.why_not_cached is None and not stays_on_images

    def _check_rows(self, epoch: int) -> None:
        if isinstance(self.source, FromStore):
            augmentation = self.keeper.provider.spec_maker.augmentation
            assert augmentation is not None  # a store was made or found
            self._fall_back(self.proof.of_rows(self.source.store, augmentation, epoch))

    def _share_problems(self) -> None:
        """What one process has found in the middle of an epoch, or finds in the store's files now, counts for all."""
        self._check_files()
        mismatch, lost = self.findings.share()
        self._fall_back(mismatch)
        if lost is not None:
            self._lose(lost)
        self.findings.lost = None

    def _check_files(self) -> None:
        if isinstance(self.source, FromStore) and self.source.is_open:
            try:
                self.source.store.check_unchanged()
            except StoreError as error:
                self._lose(str(error))

    def readable(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The loader's batches; those whose rows cannot be read from the store any more as samples."""
        for batch in self.accounts.clock.waiting(batches):
            lost = take_lost(batch)
            if lost is None:
                yield batch
            else:
                self._lose(lost[0])
                yield live_batch(self.context.source, lost[1])

    def _lose(self, why: str) -> None:
        """The rest of the epoch runs on samples; the next one opens or builds another store."""
        self.findings.lost = why
        if not isinstance(self.source, FromStore) or not self.source.is_open:
            return
        store = self.source.store
        self.announcer.warning(
            f"The feature store {store.path} was lost while it was in use: {why} The training goes on from samples "
            "until there is another one."
        )
        self.keeper.provider.lose(store)
        self._turn_to_images(FromImages(self.chain.cut, why, lost_in=self.switch.epoch))

    def _fall_back(self, why: str | None, alone: bool = False) -> None:
        """From now on the training runs on samples, unless there is no reason for it.

        Args:
            why: as a sentence; None: there is no reason.
            alone: whether the other processes do not know. They do at the end of the epoch, and where it is an error
                they raise it then, together: no process waits for one that is gone.

        Raises:
            MismatchError: under `on_mismatch="error"`.
        """
        if why is None:
            return
        if self.config.on_mismatch == "error" and not (alone and self.group.size > 1):
            raise MismatchError(
                f"the features of cut {self.chain.cut} cannot be used (any more): {why} on_mismatch='fallback' would "
                "go on from samples."
            )
        if alone:
            self.findings.mismatch = why
        if self.keeper.mismatch is None:
            self.decline(why)
        if isinstance(self.source, FromStore):
            self._turn_to_images(FromImages(self.chain.cut, why))

    def _turn_to_images(self, images: FromImages) -> None:
        self.source.close()
        self.source = images
        images.turn(self.switch)
        self.accounts.clock.give_up()
        if self.ledger.current is not None:
            self.ledger.end()
            self.ledger.begin(self.chain.cut, images.mode)

    def decline_data(self) -> bool:
        """Looks at the samples, if nobody has; whether they are such that nothing can be cached."""
        if (why := self.keeper.provider.spec_maker.look().declined) is not None:
            self.decline(f"{why}.")
        return why is not None

    def decline(self, why: str) -> None:
        self.keeper.mismatch = why
        self.announcer.warning(f"No features are stored or replayed any more, training goes on from samples: {why}")

    def step_flops(self) -> float:
        """FLOPs of the last micro-batch and of the builds before it, measured once per cut and mode."""
        flops = 0.0
        if self._last_step is not None:
            flops = self.meter.step(*self._last_step)
            if self.ledger.current is not None:
                self.ledger.current.flops += flops
        return flops + self.meter.take_build_flops()

    # What a person reads

    @property
    def store(self) -> FeatureStore | None:
        """The store that the running epoch reads; None if it reads samples."""
        return self.source.store if isinstance(self.source, FromStore) and self.source.is_open else None

    def status(self) -> FreezeStatus:
        return FreezeStatus.of(self.chain, self.store)

    def report(self) -> FreezeCacheReport:
        rates = None if self.learning_rates is None else self.learning_rates.describe()
        report = make_report(self.ledger.phases, self.meter.plain_per_step(self.ledger.training_steps))
        return replace(report, learning_rates=rates, choice=self.choice)

    def numbers(self) -> dict[str, float]:
        """What is logged beside a loss of the running epoch; nothing between epochs. See `epoch_numbers`."""
        phase = self.ledger.current
        self.ledger.settle()
        return {} if phase is None else epoch_numbers(self.report(), phase)

    def _freeze(self, cut: int) -> None:
        reshard(self.context.model)
        for parameter in self.chain.freeze(cut):
            if self.optimizer is not None:
                self.optimizer.state.pop(parameter, None)
        # BatchNorm statistics differ between processes until they are sent around: one prefix for all.
        self.group.broadcast_tensors([*self.chain.prefix_buffers(cut).values()])
