"""Asks the policy at every epoch, moves the cut, and saves the decisions in `trainer_state.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import has_length

from ..policies import Choice, ComingFreeze, FreezePolicy, Moment, ObservedBlock, Trial
from .announcements import describe_freeze, describe_other_rule, describe_schedule
from .journal import Journal

#: Version of the entry in `trainer_state.json`.
STATE_VERSION = 2


class RunningTraining(Protocol):
    """What the callback needs of a running training."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the model, the stem included."""

    def broadcast(self, value: Any) -> Any:
        """The main process's value, on every process."""

    def announce(self, message: str) -> None:
        """Tells the user, once."""

    def expect(self, coming: Sequence[ComingFreeze] | None, moment: Moment, steps_per_epoch: int) -> None:
        """Takes the freezes that are known, before an epoch begins: learning rates of their blocks may fall.

        Args:
            coming: the freezes; None: the rule never knows one before it happens.
            moment: where the training stands.
            steps_per_epoch: optimizer steps of an epoch.
        """

    def begin_step(self, step: int) -> None:
        """Gradients of an optimizer step are done; it is the next thing to happen.

        Args:
            step: number of optimizer steps before it.
        """

    def begin_epoch(self, moment: Moment, epochs_left: float) -> None:
        """Brings the cut to `moment.cut` and the source of the batches with it.

        Args:
            moment: where the training stands.
            epochs_left: epochs that remain at this cut, as far as is known, the one that begins included.
        """

    def end_epoch(self) -> None:
        """An epoch's last batch is done."""

    def end_step(self) -> None:
        """An optimizer step is done."""

    @property
    def batches(self) -> int:
        """Batches of an epoch, by the loader that `Trainer` has made."""

    @property
    def journal(self) -> Journal:
        """What happens when."""

    def check_data(self, loader: Any) -> None:
        """Before the first step: proves that rows of batches are samples and reach the training as they are."""

    #: What the rule has chosen for this training, for the report.
    choice: Choice | None

    def try_freezing(self, cut: int, max_steps: int, max_grad_norm: float | None, scheduler: Any) -> Trial | None:
        """Before the first step: a trial, with a head start for it alone.

        Returns:
            What frozen blocks do to held-out samples; None if there is no trial, or the training is too short for it.

        Args:
            cut: frozen blocks of the trial; 0: there is none.
            max_steps: optimizer steps of the training.
            max_grad_norm: to which gradients are clipped.
            scheduler: of the learning rates, as `Trainer` made it.
        """

    def plan_head_start(self, cut: int, epochs: float) -> None:
        """Before the first step: a head start, where there is to be one, at once or at the beginning of the epoch.

        Args:
            cut: frozen blocks of the first epoch, as far as that is known.
            epochs: of the training.
        """

    def rehearse(self, epochs: Mapping[int, float]) -> None:
        """Before the first step: proves that the trainer's step works on features of the cuts that are planned.

        Args:
            epochs: by cut, how many remain from its first one to the end of the training.
        """

    def watch(self, signals: frozenset[str]) -> None:
        """Collects from now on what a policy asks for."""

    def observed_blocks(self) -> Sequence[ObservedBlock]:
        """The live blocks with what is collected."""

    def state_dict(self) -> dict[str, Any]:
        """JSON values to continue from."""


class FreezeCallback(TrainerCallback, ExportableState):
    """Runs a freezing policy.

    A cut changes at the beginning of an epoch and never moves back; what a checkpoint has decided is not decided
    again. Added by `FreezeCacheTrainer`; there is nothing to configure.

    Args:
        policy: says when to freeze.

    Attributes:
        was_untrained: whether nothing is frozen in this training as it has begun from an initialization.
    """

    def __init__(self, policy: FreezePolicy | None = None):
        self.policy = policy
        self.cut = 0
        self.decided_epoch = -1
        self.was_untrained = False
        self._epoch: int | None = None
        self._num_epochs = 0
        self._session: RunningTraining | None = None
        # The rule of the checkpoint that the training was resumed from; None: it was not, or does not say.
        self._rule_before: str | None = None

    def attach(self, training: RunningTraining | None) -> None:
        """Starts a training from cut 0; None: nothing will be frozen."""
        self._session = training
        self.cut, self.decided_epoch, self._epoch, self._rule_before = 0, -1, None, None

    @property
    def _rule(self) -> FreezePolicy:
        """The policy.

        Raises:
            RuntimeError: if there is none, as in a callback that `Trainer` has made again from a checkpoint.
        """
        if self.policy is None:
            raise RuntimeError("this callback has no policy: it cannot decide for a training.")
        return self.policy

    def load_state_dict(self, attributes: Mapping[str, Any]) -> None:
        """Continues from the attributes that `state` returned."""
        self.cut, self.decided_epoch = attributes["cut"], attributes["decided_epoch"]
        self._rule_before = attributes.get("rule")
        self._rule.load_state_dict(attributes["policy"])

    def state(self) -> dict[str, Any]:
        """The entry in `trainer_state.json`."""
        attributes = {
            "version": STATE_VERSION,
            "cut": self.cut,
            "decided_epoch": self.decided_epoch,
            "was_untrained": self.was_untrained,
            "policy": {} if self.policy is None else self.policy.state_dict(),
            "rule": None if self.policy is None else self.policy.describe(),
            "session": None if self._session is None else self._session.state_dict(),
        }
        return {"args": {}, "attributes": attributes}

    def on_train_begin(self, args, state, control, train_dataloader=None, lr_scheduler=None, **kwargs):
        self._epoch = None
        session = self._session
        if session is None:
            return
        session.watch(self._rule.observes)
        if self._rule_before is not None:
            other_rule = describe_other_rule(self._rule_before, self._rule, self.cut)
            if other_rule is not None:
                session.announce(other_rule)
        session.check_data(train_dataloader)
        steps_per_epoch = self._count(session, args, state, train_dataloader)
        if state.global_step == 0:
            cut = self._rule.trial_cut(session.num_blocks)
            trial = session.try_freezing(cut, state.max_steps, args.max_grad_norm, lr_scheduler)
            if cut:
                session.announce(self._rule.take_trial(trial, session.num_blocks))
        elif self._rule.trial_cut(session.num_blocks):
            without_trial = self._rule.skip_trial(session.num_blocks)
            if without_trial is not None:
                session.announce(without_trial)
        session.choice = self._rule.choice()
        changes = self._rule.changes(session.num_blocks, self._num_epochs) or []
        planned = {cut: epoch for epoch, cut in reversed(changes) if cut and epoch < self._num_epochs}
        end = state.max_steps / steps_per_epoch
        if state.global_step == 0:
            at_start = max((cut for cut, epoch in planned.items() if epoch <= 0), default=0)
            session.plan_head_start(*session.broadcast((at_start, end)))
        schedule = describe_schedule(self._rule, session.num_blocks, self._num_epochs, self.cut)
        if schedule is not None:
            session.announce(schedule)
        session.rehearse(session.broadcast({cut: end - epoch for cut, epoch in planned.items()}))

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        session = self._session
        if session is None:
            return
        steps_per_epoch = self._count(session, args, state, train_dataloader)
        # As `Trainer` counts: a resumed training may have other steps in an epoch than the checkpoint's.
        self._epoch = state.global_step // steps_per_epoch if self._epoch is None else self._epoch + 1
        if self._epoch > self.decided_epoch:
            before, moment = self.cut, self._moment(session, state, self._epoch)
            self.cut = self._decide(session, moment)
            self.decided_epoch = self._epoch
            if not before and self.cut and self._rule.changes(moment.num_blocks, moment.num_epochs) is None:
                session.announce(describe_freeze(self._rule, self.cut, moment.num_blocks, self._epoch))
        epochs_left = state.max_steps / steps_per_epoch - self._epoch
        moment = self._moment(session, state, self._epoch)
        change = self._rule.next_change(moment)
        if change is not None:
            epochs_left = min(epochs_left, change - self._epoch)
        session.expect(self._rule.coming(moment.num_blocks, moment.num_epochs), moment, steps_per_epoch)
        session.begin_epoch(moment, session.broadcast(epochs_left))

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._session is not None:
            self._session.end_epoch()

    def on_log(self, args, state, control, **kwargs):
        if self._session is not None:
            self._session.journal.log(len(state.log_history))

    def on_step_end(self, args, state, control, **kwargs):
        if self._session is not None:
            self._session.end_step()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self._session is None:
            return
        self._session.begin_step(state.global_step)
        if self._epoch is None or not self._rule.observes:
            return
        self._rule.observe(self._moment(self._session, state, self._epoch), self._session.observed_blocks())

    def _decide(self, session: RunningTraining, moment: Moment) -> int:
        answer = session.broadcast(self._rule.decide(moment))
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer <= moment.num_blocks:
            raise ValueError(
                f"{type(self.policy).__name__} decided for cut {answer!r} in epoch {moment.epoch}; a cut is an "
                f"integer from 0 to {moment.num_blocks}."
            )
        return max(self.cut, answer)

    def _count(self, session: RunningTraining, args, state, loader: Any) -> int:
        """Counts the epochs of the training; `Trainer` takes one over a loader without a length as endless.

        Returns:
            Optimizer steps of an epoch.
        """
        batches = len(loader) if has_length(loader) else session.batches
        steps_per_epoch = max(-(-batches // args.gradient_accumulation_steps), 1)
        self._num_epochs = min(state.num_train_epochs, -(-state.max_steps // steps_per_epoch))
        return steps_per_epoch

    def _moment(self, session: RunningTraining, state, epoch: int) -> Moment:
        return Moment(
            epoch=epoch,
            num_epochs=self._num_epochs,
            step=state.global_step,
            max_steps=state.max_steps,
            cut=self.cut,
            num_blocks=session.num_blocks,
        )
