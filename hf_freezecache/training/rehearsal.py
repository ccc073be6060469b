"""Proof in the trainer's own path: its loss and gradients on a few rows, whole and with the prefix bypassed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers.utils import logging

from ..build.context import BuildContext
from ..build.feature_sources import agree_on_padding
from ..build.materialize import spread
from ..build.padded_samples import has_widths
from ..build.several_sizes import one_of_each_size, rows_by_size
from ..build.text_lengths import rows_by_length
from ..build.trimming import settle_trimming
from ..build.widest import narrow_batch
from ..distributed import Announcer, count_operations, describe_error
from ..model.modes import eval_mode, untouched
from ..model.rounding import relative_difference
from ..model.stand_ins import FrozenOutputError, StandIn, stays_real
from ..model.tokens import blank_padding, token_mask
from ..replay.collator import CODE_PREFIX, SIZE
from ..rng import preserve_rng
from .epoch_source import StepInputs, with_main_input

logger = logging.get_logger(__name__)

#: Rows of a rehearsal, spread over the data set.
_ROWS = 4
#: Deviation relative to the largest value that is accepted where the same step twice is not the same bit for bit.
_TOLERANCE = 1e-2
#: Times that the same step twice deviates which are accepted as well: gradients that cancel out are all noise.
_NOISE = 8.0
#: Name of the only code of a rehearsed batch.
_REHEARSED = CODE_PREFIX + "rehearsed"
#: Name of the entry that tells the size of its main input.
_SIZE = CODE_PREFIX + SIZE


class RehearsalError(ValueError):
    """A training on features would not be the training on samples; the message says where they part."""


@dataclass(frozen=True)
class Outcome:
    """What a trainer's step has computed.

    Args:
        loss: of the batch, a number.
        outputs: tensors that the model has returned, by their place in its output.
        gradients: of the trained parameters, by name; those without one are missing.
    """

    loss: torch.Tensor
    outputs: Mapping[str, torch.Tensor]
    gradients: Mapping[str, torch.Tensor]


class Step(Protocol):
    """A trainer's own steps on the micro-batches of one update, without the update."""

    def __call__(self, *batches: Mapping[str, Any]) -> Outcome:
        """Runs one step per micro-batch.

        Args:
            batches: collated, as many as the update accumulates.

        Returns:
            The sums of losses and gradients, which the step has divided; the outputs of the last batch.
        """


#: Makes a context in which such steps run, with gradients of the parameters of these names; of all if None.
Rehearsing = Callable[[Collection[str] | None], AbstractContextManager[Step]]


class Rehearsal:
    """Runs a few rows through a trainer's own step.

    Args:
        context: model, samples and settings.
        rehearsing: makes a context in which the trainer's steps run without any update.
        suspects: what users have overridden in the path of the loss, for messages.
    """

    def __init__(self, context: BuildContext, rehearsing: Rehearsing, suspects: Sequence[str] = ()):
        self.context, self.suspects = context, suspects
        self._rehearsing = rehearsing
        self._cut: int | None = None

    @property
    def is_running(self) -> bool:
        """Whether the trainer's step that runs now is a rehearsal."""
        return self._cut is not None

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, the trainer's steps run on samples, whatever is frozen, and are none of the training's."""
        with self._running(0):
            yield

    def check(self, cut: int) -> None:
        """Compares the whole step with the replayed one, on exact features: loss, outputs and gradients.

        The model, its gradients and the generators are left as they are. All processes take the same runs, since the
        step may communicate; where it fails on one, it fails on all.

        Args:
            cut: frozen blocks; `freeze` has frozen them.

        Raises:
            RehearsalError: if the two differ, or the step fails on features.
        """
        chain = self.context.chain
        found = self._compare(cut)
        if found is None:
            self._settle_width(cut)
            return
        if chain.padding.ignored(cut):
            chain.padding.keep(cut, f"a training step reads what is at padding: without it, {found}")
            self.check(cut)
            return
        raise RehearsalError(
            f"a training step on features of cut {cut} is not the step on samples: {found}.{self._advice()}"
        )

    def _settle_width(self, cut: int) -> None:
        """Where samples have no common width, and features include that: whether they can be trimmed, or keep sizes.

        If they can, the step is compared once more on narrow samples, with the record of the widest; or on some of the
        smallest and of the largest size.
        """
        context, chain = self.context, self.context.chain
        if chain.padding.ignored(cut) or chain.padding.why_not_trimmed(cut) is not None:
            return
        if not context.group.on_main(lambda: has_widths(context.source, chain.main_input)):
            return
        if settle_trimming(context, cut) is not None:
            return
        for batch in context.group.on_all(self._other_sizes):
            found = self._compare(cut, batch)
            if found is not None:
                why = f"a training step on those of a batch of another size is not the step: {found}"
                chain.padding.stop_trimming(cut, why)
                return

    def _other_sizes(self) -> Sequence[Mapping[str, Any]]:
        source, main_input = self.context.source, self.context.chain.main_input
        return one_of_each_size(source, 2) if source.sizes else [narrow_batch(source, main_input)]

    def _compare(self, cut: int, collated: Mapping[str, Any] | None = None) -> str | None:
        """Where the whole step and the replayed one part on some process, as a clause; None if they agree.

        Args:
            cut: frozen blocks.
            collated: a batch of samples; None: rows from all over the data set.
        """
        group, chain = self.context.group, self.context.chain
        batch, on_features, mask = group.on_all(lambda: self._batches(cut, collated))
        if agree_on_padding(chain, cut, group):
            return self._compare(cut, collated)
        with self._running(cut):
            whole = group.on_all(lambda: self._run(batch, "a batch of samples"))
            replayed = group.on_all(lambda: self._replay(on_features, batch))
            difference = find_difference(whole, replayed, mask=mask)
            if not any(group.gather(difference is not None)):
                return None
            # An accelerator's kernels may differ from run to run. Only then is what is close accepted.
            again = group.on_all(lambda: self._run(batch, "a batch of samples"))
        if difference is not None and find_difference(whole, again) is not None:
            difference = find_difference(whole, replayed, _TOLERANCE, mask, again)
        return next((reason for reason in group.gather(difference) if reason is not None), None)

    def step_inputs(self, batch: Mapping[str, Any]) -> StepInputs:
        """The inputs of a rehearsed step."""
        assert self._cut is not None, "called inside `check` only"
        chain, features = self.context.chain, batch.get(_REHEARSED)
        if features is None:
            return StepInputs(dict(batch), 0)
        others = {name: value for name, value in batch.items() if name not in (_REHEARSED, _SIZE)}
        if _SIZE in batch:
            others = with_main_input(chain, others, batch[_SIZE])
        return StepInputs.on_features(chain, self._cut, features, others, "replay")

    def _batches(
        self, cut: int, collated: Mapping[str, Any] | None = None
    ) -> tuple[Mapping[str, Any], Mapping[str, Any], torch.Tensor | None]:
        """A few rows as a batch of samples and as one of features; and where their tokens are, if padding is not kept.

        Args:
            cut: frozen blocks.
            collated: the batch; None: rows from all over the data set.

        Where no row has padding, nothing would show whether something reads what is there: then it is kept.
        """
        batch, chain = self._batch() if collated is None else collated, self.context.chain
        with preserve_rng():
            features = chain.prefix(self.context.model_inputs(batch), cut)
            self._check_labels(batch, cut, features)
        mask = token_mask(batch, chain.main_input) if chain.padding.ignored(cut) else None
        if mask is not None and mask.all():
            chain.padding.keep(cut, "none of the samples that were looked at is padded")
            mask = None
        if mask is not None:
            features = blank_padding(features, mask)
        kept = {name: value for name, value in batch.items() if name != chain.main_input or stays_real(value)}
        if chain.padding.is_any_size(cut):
            main = batch[chain.main_input]
            kept[_SIZE] = main.new_empty(*main.shape, 0)
        return batch, {_REHEARSED: features, **kept}, mask

    def _check_labels(self, batch: Mapping[str, Any], cut: int, features: torch.Tensor) -> None:
        """Raises RehearsalError if frozen blocks read the labels, which features are made without."""
        others = self.context.model_inputs.with_other_labels(batch)
        if others is None:
            return
        chain = self.context.chain
        try:
            with torch.no_grad(), eval_mode(chain.model):
                found = chain.capture(others, cut)
        except Exception as error:  # the model's own code may raise anything; the step itself will tell
            Announcer.survived(logger, "The frozen blocks do not run with other labels", error)
            return
        if found.shape != features.shape or relative_difference(found, features) > chain.own_trace().tolerance(
            features.dtype, features.device
        ):
            raise RehearsalError(
                f"the frozen blocks of cut {cut} read the labels (a decoder that gets them shifted), and features "
                "are made without them: freeze fewer blocks, or use cache='never'."
            )

    def _batch(self) -> Mapping[str, Any]:
        source = self.context.source
        count = min(_ROWS, len(source))
        with preserve_rng():
            if source.sizes:
                return self._of_common_size(source.sizes)
            try:
                batch = source.collate(spread(len(source), count))
                if token_mask(batch, self.context.chain.main_input) is None:
                    return batch
                by_length = rows_by_length(source, self.context.chain.main_input) or list(range(count))
                return source.collate([by_length[place] for place in spread(len(by_length), count)])
            except Exception as error:  # rows from far apart may not be collated together: of several sizes, say
                Announcer.survived(logger, "Rows from all over the data set cannot be collated together", error)
                sizes = rows_by_size(source, self.context.chain.main_input)
                return self._of_common_size(sizes) if sizes else self._neighbours(count)

    def _of_common_size(self, sizes: Sequence[Sequence[int]]) -> Mapping[str, Any]:
        source = self.context.source
        return source.collate(max(sizes, key=len)[: min(_ROWS, source.batch_size)])

    def _neighbours(self, count: int) -> Mapping[str, Any]:
        try:
            return self.context.source.collate(self.context.source.rows(0)[:count])
        except Exception as error:  # the user's own code may raise anything
            raise RehearsalError(f"collating the first {count} rows failed with {describe_error(error)}") from error

    def _run(self, batch: Mapping[str, Any], what: str) -> Outcome:
        try:
            with untouched(self.context.model), self._rehearsing(None) as step:
                return step(dict(batch))
        except Exception as error:  # the user's own code may raise anything
            advice = self._look_at if isinstance(error, FrozenOutputError) else self._advice()
            raise RehearsalError(f"a training step on {what} fails with {describe_error(error)}{advice}") from error

    def _replay(self, on_features: Mapping[str, Any], batch: Mapping[str, Any]) -> Outcome:
        before = count_operations()
        try:
            return self._run(on_features, "a batch of features")
        except RehearsalError:
            if self.context.group.size > 1 and count_operations() == before:
                # Others may have come to where the step communicates, and wait: this process comes there, too.
                self._run(batch, "a batch of samples")
            raise

    def _advice(self) -> str:
        return (
            " What computes the loss reads something that exists on samples only, or changes the model's input."
            f"{self._look_at} cache='never' freezes without features."
        )

    @property
    def _look_at(self) -> str:
        return f" Look at {', '.join(self.suspects)}." if self.suspects else ""

    @contextmanager
    def _running(self, cut: int) -> Iterator[None]:
        self._cut = cut
        try:
            yield
        finally:
            self._cut = None


def find_difference(
    whole: Outcome,
    replayed: Outcome,
    tolerance: float = 0.0,
    mask: torch.Tensor | None = None,
    again: Outcome | None = None,
) -> str | None:
    """Where two outcomes of a step part, as a clause; None if they agree.

    Outputs that are stand-ins on features are left out: who reads them gets an error.

    Args:
        whole: of the step on samples.
        replayed: of the step on features.
        tolerance: accepted deviation, relative to the largest value of a tensor.
        mask: bool `(B, W)`, where the tokens of texts are; outputs at padding are not compared. None: all are.
        again: of the step on samples once more: some times as much as it deviates is accepted, too.

    Shapes: B rows, W positions of a text.
    """
    same = whole if again is None else again
    if not _agree(whole.loss, replayed.loss, same.loss, tolerance):
        return f"the loss is {_show(whole.loss)} on samples and {_show(replayed.loss)} on features"
    for name, value in whole.outputs.items():
        other, noisy = replayed.outputs.get(name), same.outputs.get(name, value)
        if mask is not None and other is not None and not isinstance(other, StandIn):
            value, other, noisy = (blank_padding(each, mask) for each in (value, other, noisy))
        if other is None or not (isinstance(other, StandIn) or _agree(value, other, noisy, tolerance)):
            return f"the model's output '{name}' differs"
    if whole.gradients.keys() != replayed.gradients.keys():
        names = sorted(whole.gradients.keys() ^ replayed.gradients.keys())
        return f"'{names[0]}' gets a gradient from one of them only"
    for name, value in whole.gradients.items():
        other = replayed.gradients[name]
        if not _agree(value, other, same.gradients.get(name, value), tolerance):
            return f"the gradient of '{name}' differs{_by_how_much(value, other)}"
    return None


def _agree(one: torch.Tensor, other: torch.Tensor, again: torch.Tensor, tolerance: float) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    allowed = 0.0
    if one.numel() and tolerance:
        allowed = tolerance * float(one.abs().max()) + _NOISE * float((one - again).abs().max())
    return torch.allclose(one, other, rtol=0.0, atol=allowed, equal_nan=True)


def _by_how_much(one: torch.Tensor, other: torch.Tensor) -> str:
    if one.shape != other.shape or not one.numel():
        return ""
    return f" by up to {float((one - other).abs().max()):.2g}, where its largest value is {float(one.abs().max()):.2g}"


def _show(loss: torch.Tensor) -> str:
    return f"{float(loss):.7g}" if loss.numel() == 1 else f"of shape {tuple(loss.shape)}"
