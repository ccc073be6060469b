"""What is proved before the first step of a training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ..build.feature_sources import one_width_only
from ..cache.codec import make_codec
from ..cache.manifest import StoreError
from ..cache.rows import split_batch
from ..cache.store import FeatureStore
from ..cache.texts import split_texts
from ..distributed import Announcer
from ..model.errors import ChainError
from ..model.freshness import is_untrained
from ..model.tokens import token_mask
from ..policies import Trial
from ..replay.passage import trial_rows, why_not_through
from ..replay.requests import sampler_of
from .data_state import looking_at
from .drawn_rows import SamplerError, ask_sampler
from .freezing_trial import Updates, kept
from .preconditions import check_trainable
from .rehearsal import RehearsalError
from .trial_rates import rates_of_trial

if TYPE_CHECKING:
    from .session import FreezeSession

logger = logging.get_logger(__name__)

#: Head start for a trial alone: epochs, and batches at most.
_EPOCHS_FOR_TRIAL, _BATCHES_FOR_TRIAL = 2, 64


def plan_head_start(session: FreezeSession, cut: int, epochs: float) -> None:
    """Gives a head start, or leaves it to the first epoch, if that may have a store, which spares blocks.

    Args:
        session: the training.
        cut: frozen blocks of the first epoch, as far as that is known.
        epochs: of the training.

    Raises:
        ValueError: if the head cannot be trained alone.
    """
    if not session.config.epochs_of_head_start:
        return
    if epochs < 1 and session.config.head_start_epochs is None:
        # A part of an epoch (a trial run of ten steps, say) is not to wait for a look at all samples.
        session.head_start.most = math.ceil(epochs * session.batches * session.context.source.batch_size)
    session.head_start.is_due = cut > 0 and _may_have_store(session, cut, epochs)
    if not session.head_start.is_due:
        give_head_start(session)


def _may_have_store(session: FreezeSession, cut: int, epochs: float) -> bool:
    """Whether a store may be found or built for the first epoch, which does not need the head to be trained before."""
    if session.keeper.why_not_cached is not None:
        return False
    chain = session.chain
    if make_codec(session.config.codec_at(cut, len(chain)), chain.layout(cut)).uses_weights:
        return False  # the head tells how much an error in a channel costs
    return session.keeper.provider.why_hopeless(cut, epochs) is None


def give_head_start(session: FreezeSession, store: FeatureStore | None = None) -> None:
    """Trains the head alone, where the settings ask for it and it is new, and books what it takes.

    Args:
        session: the training.
        store: of the first cut; None: all that runs before the head runs on samples.

    Raises:
        ValueError: if the head cannot be trained alone, and the settings say that it is to be.
    """
    session.head_start.is_due = False
    with session.shards.whole() as is_whole:
        if is_whole:
            _give_head_start(session, store)
            return
    why = "the head learns alone on whole weights, and not all processes have room for them."
    if session.config.head_start_epochs is not None:  # it was asked for
        raise ValueError(f"head_start_epochs={session.config.head_start_epochs}: {why}")
    session.announcer.warning(f"No head start: {why}")


def _give_head_start(session: FreezeSession, store: FeatureStore | None) -> None:
    epochs, cut = session.config.epochs_of_head_start, 0 if store is None else store.manifest.cut
    try:
        _ask_sampler(session)
        with looking_at(session.context.source), session.ledger.phase(cut, "head_start") as phase:
            started = session.head_start.run(epochs, store, session.head_start.most)
    except Exception as error:  # of a disk, or of the user's samples, step or loss
        if store is not None and isinstance(error, (StoreError, OSError)):
            session.announcer.failure("The head start takes samples, as the feature store could not be read", error)
            return _give_head_start(session, None)
        if session.config.head_start_epochs is not None:  # it was asked for
            raise
        session.announcer.failure("The head does not learn alone before the training", error)
        return
    if started is None:
        session.ledger.drop(phase)
        _say_why_none(session)
        return
    if started.is_kept:
        session.shards.take_over(started.parameters)
    phase.epochs, phase.steps = epochs, started.steps
    phase.flops += session.meter.per_sample("eval") * session.meter.mean_seen() * started.passes
    session.meter.book(phase.flops)
    session.announcer.warning(started.describe())


def _say_why_none(session: FreezeSession) -> None:
    is_asked_for = session.config.head_start_epochs is not None
    say = session.announcer.warning if is_asked_for else session.announcer.info
    if is_untrained(session.chain.model):
        say("No head start: the whole model has the weights of its initialization.")
    elif session.config.head_start == "always":
        say("No head start: nothing behind the last block is trained.")
    else:
        say(
            "No head start: nothing behind the last block is known to have the weights of an initialization (of what "
            "has no bias that cannot be told). head_start='always' trains all that is behind it."
        )


def try_freezing(
    session: FreezeSession, cut: int, max_steps: int, max_grad_norm: float | None, scheduler: Any
) -> Trial | None:
    """Trains a few steps with frozen blocks and with none, and takes these back.

    A new head gets a short head start for the trial alone, which is taken back as well: gradients of a random head say
    nothing of the blocks.

    Args:
        session: the training.
        cut: frozen blocks of the trial; 0: there is none.
        max_steps: optimizer steps of the training.
        max_grad_norm: to which gradients are clipped; None or 0: they are not.
        scheduler: of the learning rates of the training.

    Returns:
        The losses on held-out training samples; None if the training is too short for a trial.
    """
    check_trainable(session.chain, cut)
    try:
        if cut:
            _ask_sampler(session)
    except SamplerError as error:
        session.announcer.failure("There is no trial before the training", error)
        return None
    plan = session.trial.plan(max_steps) if cut else None
    if any(steps is None for steps in session.group.gather(None if plan is None else plan.steps)):
        plan = None
    if plan is None:
        return None
    session.head_start.leave_out = len(plan.held_out)
    trainable = {name: value for name, value in session.chain.model.named_parameters() if value.requires_grad}
    with looking_at(session.context.source), session.ledger.phase(0, "trial") as phase, kept(trainable):
        most = _BATCHES_FOR_TRIAL * session.context.source.batch_size
        passes = _start_for_trial(session, most)
        phase.flops += session.meter.per_sample("eval") * session.meter.mean_seen() * passes
        optimizer = getattr(session.optimizer, "optimizer", session.optimizer)  # accelerate has wrapped it
        rates = rates_of_trial(scheduler, optimizer, plan.steps, max_steps)
        trial = session.trial.run(cut, plan, Updates(optimizer, rates, max_grad_norm))
    phase.steps = 2 * plan.steps
    trained, tested = plan.samples_run
    live, forward = session.meter.per_sample("live", 0), session.meter.per_sample("eval")
    # A backward pass takes two forward passes, and ends at the cut.
    frozen = live - 2 * session.chain.share(cut) * forward
    phase.flops += session.meter.mean_seen() * (trained * (live + frozen) + 2 * tested * forward)
    session.meter.book(phase.flops)
    return trial


def _ask_sampler(session: FreezeSession) -> None:
    """Finds out which samples the training draws, and how often: no other is to teach it anything.

    Raises:
        SamplerError: on every process, if that cannot be told.
    """
    source, loaders = session.context.source, (session.iterated, session.loader)
    loader = next((loader for loader in loaders if sampler_of(loader) is not None), None)
    source.sampled = session.group.on_main(lambda: ask_sampler(loader, len(source)))


def _start_for_trial(session: FreezeSession, most: int) -> float:
    """Trains the head for a trial; the forward passes of a sample through the whole model that it took."""
    goes_on, is_asked_for = bool(session.config.epochs_of_head_start), bool(session.config.head_start_epochs)
    try:
        started = session.head_start.run(_EPOCHS_FOR_TRIAL, most=most, is_trial=True, goes_on=goes_on)
    except (ChainError, RehearsalError) as error:
        if is_asked_for:
            raise
        Announcer.survived(logger, "The head cannot be trained alone before the trial", error)
        return 0.0
    return 0.0 if started is None else started.passes


def rehearse(session: FreezeSession, epochs: Mapping[int, float]) -> None:
    """Looks whether stores can be written, and runs the trainer's own step on features of the cuts that are planned.

    Args:
        session: the training.
        epochs: by cut, how many remain from its first one to the end of the training.

    Raises:
        NotWritable: under explicit settings with `cache="always"`, if a store is planned and cannot be written.
        RehearsalError: under explicit settings, if it is not the step on samples; under `cache="always"`, if the
            features of samples of several widths cannot be stored.
    """
    if session.keeper.why_not_cached is not None:
        return
    session.keeper.check_directory(is_planned=bool(epochs))
    if session.chain.cut:
        return
    hopeless = session.keeper.provider.why_hopeless
    with looking_at(session.context.source), session.shards.whole(bool(epochs)):
        if session.keeper.why_not_cached is not None:  # weights that were to be whole
            return
        cuts = [cut for cut, count in sorted(epochs.items()) if hopeless(cut, count) is None]
        why, is_error = session.proof.rehearse(cuts), session.explicit
        if why is None:
            why, is_error = _why_of_one_width(session, cuts), session.config.cache == "always"
        if why is None or session.decline_data():
            return
    if is_error:
        raise RehearsalError(why)
    session.decline(why)


def _why_of_one_width(session: FreezeSession, cuts: Sequence[int]) -> str | None:
    """Why samples without a common width cannot be cached at one of the cuts; None if they can."""
    padding = session.chain.padding
    kept = next((cut for cut in cuts if padding.why_not_trimmed(cut) is not None), None)
    return None if kept is None else one_width_only(session.chain, kept, session.context.source)


def check_data(session: FreezeSession, loader: Any) -> None:
    """Checks that rows of batches are samples, and reach the training as they are.

    Args:
        session: the training.
        loader: that it iterates over.

    Raises:
        ValueError: under `cache="always"`, if they are or do not.
    """
    shared, session.shared = session.shared, ()
    session.iterated = loader
    if session.keeper.why_not_cached is not None:
        return
    augmentation = session.group.broadcast(session.keeper.provider.spec_maker.augmentation)
    why = None if augmentation is None else augmentation.declined
    if why is None:
        found = session.group.gather(_why_not_through(session, loader, shared))
        why = next((reason for reason in found if reason is not None), None)
    if why is None:
        return
    if session.config.cache == "always":
        raise ValueError(f"cache='always', but features cannot be cached: {why}. Use cache='auto' or 'never'.")
    session.decline(f"{why}.")


def _why_not_through(session: FreezeSession, loader: Any, shared: Sequence[Any]) -> str | None:
    if loader is session.loader:
        return None
    source = session.context.source
    with looking_at(source):
        batch, main_input = source.probe(), session.chain.main_input
        is_text = token_mask(batch, main_input) is not None
        probe = split_texts(batch, source.texts) if is_text else split_batch(batch, main_input)
    rows = trial_rows(probe, source.batch_size)
    return why_not_through(loader, session.loader, session.switch, rows, shared)
