"""Whether batches of a store pass through what a user has put around the training's loader."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.state import GradientState, PartialState
from torch.utils.data import DataLoader
from transformers.utils import logging

from ..cache.rows import BatchSplit, is_same
from ..distributed import Announcer, describe_error
from ..rng import preserve_rng
from .dataset import BatchRows, CachedRows
from .requests import RequestedRow, RowOrigin, SourceSwitch, Trial, find_switch

logger = logging.get_logger(__name__)

#: Values of the only code of a trial batch.
_CODES = 4
#: Batches that a wrapper may yield before the one that was put in.
_PATIENCE = 3


def trial_rows(probe: BatchSplit, count: int) -> CachedRows:
    """Rows as a store would return them, with codes that mean nothing.

    Args:
        probe: a few collated samples.
        count: number of rows.
    """
    places = torch.arange(count) % len(probe.main)
    entries: dict[str, Any] = {"base": (torch.arange(count * _CODES) % 251).to(torch.uint8).reshape(count, _CODES)}
    for name, value in probe.columns.items():
        entries[name] = value[places] if isinstance(value, torch.Tensor) else [value[place] for place in places]
    rows = BatchRows.of([RequestedRow(place, RowOrigin()) for place in range(count)])
    return CachedRows({**entries, **probe.constants}, ("base",), rows)


def why_not_through(
    outer: Any, inner: Any, switch: SourceSwitch, rows: CachedRows, shared: Sequence[Any] = ()
) -> str | None:
    """Why replay does not work through what `get_train_dataloader` returned; None if it does.

    A batch of features is sent through a copy of it. Samplers, generators and loader processes do not notice.

    Args:
        outer: what the training iterates over.
        inner: the loader that `Trainer` has made.
        switch: of the loader.
        rows: of the batch; as many as a batch has.
        shared: objects that the copy shares with the original: the trainer, the model and so on.

    Returns:
        The reason, as the end of a sentence.
    """
    if outer is inner:
        return None
    if isinstance(outer, DataLoader) and find_switch(outer) is not switch:
        return "the batches of the loader from `get_train_dataloader` do not come through the trainer's sampler"
    if isinstance(outer, Iterator):
        return "what `get_train_dataloader` returns can be iterated over only once"
    if find_switch(inner) is not switch:
        return "the trainer's loader has no sampler"
    try:
        copied = copy.deepcopy(outer, {id(one): one for one in (inner, switch, inner.dataset, *shared)})
    except Exception as error:  # of whatever the user's object holds
        Announcer.survived(logger, "The train loader cannot be copied", error)
        return f"what `get_train_dataloader` returns cannot be tried out on a copy: {describe_error(error)}"
    with preserve_rng(), _trying(inner, switch, rows):
        expected = next(iter(inner))
        try:
            passed = [batch for batch, _ in zip(copied, range(_PATIENCE), strict=False)]
        except Exception as error:  # of the user's code
            Announcer.survived(logger, "The train loader fails on features", error)
            return (
                "what `get_train_dataloader` returns fails on a batch of features in the place of samples: "
                f"{describe_error(error)}"
            )
    if any(isinstance(batch, Mapping) and is_same(dict(expected), dict(batch)) for batch in passed):
        return None
    return "a batch of features does not come out of `get_train_dataloader`'s loader as it went in"


@contextlib.contextmanager
def _trying(inner: Any, switch: SourceSwitch, rows: CachedRows) -> Iterator[None]:
    """Inside, iterations over the loader yield the trial batch, made in this process; outside, all is as before."""
    loader, state = getattr(inner, "base_dataloader", inner), GradientState()
    workers, iteration, references = loader.num_workers, getattr(inner, "iteration", None), state.dataloader_references
    loader.num_workers = 0
    try:
        with switch.trying(Trial(rows, len(rows.requested.numbers), PartialState().num_processes)):
            yield
    finally:
        loader.num_workers = workers
        state.dataloader_references = references
        if iteration is not None:
            inner.iteration = iteration
