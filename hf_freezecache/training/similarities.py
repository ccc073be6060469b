"""Inner products of a few fixed training samples in the output of every live block."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..build.context import BuildContext
from ..build.several_sizes import rows_by_size
from ..build.spread_rows import spread_rows
from ..cache.rows import RowError
from ..distributed import describe_error
from ..model.similarities import read_similarities
from ..policies.cka import gram
from .data_state import looking_at

#: Samples that are compared.
SAMPLES = 32
#: Largest share of a training's FLOPs that a reading may take; but there is one at the beginning of every epoch.
_SHARE = 0.01


class SampleSimilarities:
    """Reads how alike a few fixed training samples are to each block, in eval mode and without gradients.

    The samples are the same in every reading: rows from all over the training data, as the base view has them.
    Generators, buffers and modes stay as they are. All processes read, though the main one alone decides: a model may
    communicate.

    Args:
        context: model, samples and settings.
        count: is told the inputs whenever the model has run on them.
        batches_per_step: batches that an optimizer step of this process takes.
    """

    def __init__(self, context: BuildContext, count: Callable[[Mapping[str, Any]], None], batches_per_step: int = 1):
        self.context, self._count, self.batches_per_step = context, count, batches_per_step
        self._batch: Any = None

    def prepare(self) -> None:
        """Reads the samples, once.

        Raises:
            ValueError: on all processes, if they cannot be collated together.
        """
        if self._batch is None:
            self.context.group.on_all(self._collate)

    def is_due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether there is a reading before an optimizer step: in the first one of an epoch, and some between them.

        Args:
            step: number of optimizer steps before it.
            steps_per_epoch: optimizer steps of an epoch.
        """
        return step % steps_per_epoch % self.interval() == 0

    def interval(self) -> int:
        """Optimizer steps from one reading to the next, so that they cost little beside the steps."""
        chain, batch = self.context.chain, self.context.source.batch_size * self.batches_per_step
        live = max(1.0 - (chain.share(chain.cut) if chain.cut else 0.0), 1e-3)
        return max(1, math.ceil(SAMPLES / (3 * batch * live * _SHARE)))  # a step is three forward passes

    def read(self) -> dict[int, torch.Tensor]:
        """Inner products `(N, N)`, float32 on the CPU, by the index of a live block.

        Shapes: N samples, fewer than `SAMPLES` in a small data set.
        """
        chain, inputs = self.context.chain, self.context.model_inputs(self._batch)
        read = read_similarities(chain.model, chain.blocks[chain.cut :], inputs, gram)
        self._count(inputs)
        return dict(enumerate(read, start=chain.cut))

    def _collate(self) -> None:
        source, main_input = self.context.source, self.context.chain.main_input
        with looking_at(source):
            sizes = rows_by_size(source, main_input)
            rows = max(sizes, key=len)[:SAMPLES] if sizes else spread_rows(source.dataset, SAMPLES, source.seed)
            try:
                batch = source.collate(rows)
                if len(batch[main_input]) < 2:
                    raise RowError(f"there is no second sample to compare with ({len(rows)} of equal size)")
            except Exception as error:  # whatever a collator raises about samples that it cannot put together
                raise ValueError(
                    f"the policy compares blocks over {len(rows)} training samples, which cannot be collated "
                    f"together: {describe_error(error)}. Take a policy that does not compare them, such as 'linear'."
                ) from error
        self._batch = batch
