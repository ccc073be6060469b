"""Collated batches with what the head gets of their samples: all that runs before it runs once, or a store has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm

from ..build.context import BuildContext
from ..build.several_sizes import rows_by_size
from ..cache.manifest import StoreError
from ..cache.rows import RowSource
from ..cache.shelf import InFile, InMemory, TensorShelf
from ..cache.store import FeatureStore
from ..model.head import Head
from ..model.stand_ins import stays_real
from ..model.structure import Path
from ..replay.collator import CODE_PREFIX, SIZE
from .drawn_rows import in_batches, in_random_order, of_batches, of_node_in_random_order
from .epoch_source import FromStore, with_main_input

#: Names of the codes of a batch of the head start: what the head gets, and the shape of the main input, and 0.
FEATURES, OWN_SIZE = CODE_PREFIX + "head", CODE_PREFIX + SIZE
#: Sizes of samples at which the head alone is compared with the whole model.
_PROVED_SIZES = 8


@dataclass(frozen=True)
class HeadBatch:
    """A collated batch and what the head gets of its samples.

    Args:
        inputs: without the main input, unless that is of integers; of any other its shape.
        samples: number of them.
        kept: where the features are.
    """

    inputs: Mapping[str, Any]
    samples: int
    kept: InMemory | InFile

    @property
    def collated(self) -> dict[str, Any]:
        """What a step of the head alone runs on."""
        return {FEATURES: self.kept.read(), **self.inputs}


@dataclass
class _Proof:
    """What the whole model answers on a batch, to be compared once all others have run.

    Args:
        inputs: of the model, of whose main input no numbers are read.
        features: of the batch.
        expected: the answers.
    """

    inputs: Mapping[str, Any]
    features: torch.Tensor
    expected: Mapping[Path, torch.Tensor]


class HeadBatches:
    """Makes the batches of a head start, of this process.

    Args:
        context: model, samples and settings.
        head: of the model.
        shelf: keeps features.
        see: is told each batch on which blocks run.
    """

    def __init__(
        self, context: BuildContext, head: Head, shelf: TensorShelf, see: Callable[[Mapping[str, Any]], None]
    ):
        self.context, self.head, self.shelf, self._see = context, head, shelf, see
        self._main_input = context.chain.main_input

    def rows(self, leave_out: int, most: int | None, store: FeatureStore | None = None) -> list[Sequence[int]]:
        """This process's share of all rows in random order, in batches; where nodes store shares, of its node's.

        Args:
            leave_out: how many of the first ones are held out.
            most: of the others, at most.
            store: from which their features are read; None: from none.
        """
        source, group = self.context.source, self.context.group
        source.sizes = group.on_main(lambda: rows_by_size(source, self._main_input))
        if store is not None and store.share is not None:  # what a trial has held out lies on any node
            rows = of_node_in_random_order(source, group, self.context.disk, store.share.rows())[:most]
        else:
            rows = in_random_order(source, group)[leave_out:][:most]
        return group.on_all(lambda: in_batches(source, rows, self._main_input))

    def make(
        self, batches: Sequence[Sequence[int]], store: FeatureStore | None, done: Sequence[HeadBatch] = ()
    ) -> list[HeadBatch]:
        """Runs what is before the head; as many batches on all processes, those for which there is room.

        Args:
            batches: their rows.
            store: whose features take the place of the blocks before its cut; None: these run as well.
            done: the first of them, made before.

        Raises:
            ChainError: if the head alone does not answer as the whole model does, on samples of some size.
            StoreError: if the store cannot be read.
        """
        group = self.context.group

        def make() -> list[HeadBatch]:
            found, proofs = list(done), list[_Proof]()
            missing = batches[len(done) :]
            drawn = of_batches(self.context.source, missing, store)
            bar = tqdm(
                total=sum(map(len, missing)),
                desc="Features for the head",
                unit=" samples",
                disable=self.context.disable_tqdm or not group.is_main,
            )
            with bar:
                for batch, inputs, cut, known in self._draw(drawn, store):
                    self._see(batch)
                    features = self.head.features(inputs, cut, known)
                    here = features.cpu()
                    kept = self.shelf.add(here)
                    if kept is None and found:
                        break
                    found.append(self._keep(batch, inputs, kept or InMemory(here)))
                    self._prove_later(proofs, inputs, features, partial(self.head.answers, inputs, cut, known))
                    bar.update(found[-1].samples)
            for proof in proofs:
                self.head.compare(proof.inputs, proof.features, proof.expected)
            return found

        found = group.on_all(make)
        return found[: min(group.gather(len(found)))]

    def _draw(
        self, drawn: RowSource, store: FeatureStore | None
    ) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any], int, torch.Tensor | None]]:
        """Batches, the model's inputs of them, and the cut up to which it does not run with the feature there.

        From a store, features are what replay epochs get.
        """
        source = None if store is None else FromStore(store.manifest.cut, store)
        for _, (view, *_others) in drawn.loader(range(drawn.num_ranges)):
            if source is None:
                yield view.batch, self.context.model_inputs(view.batch), 0, None
                continue
            step = source.step_inputs(dict(view.batch), self.context)
            if not step.bypassed:
                raise StoreError(f"{source.store.path} does not hold the samples that the data set gives now.")
            yield step.inputs, self.context.model_inputs(step.inputs), step.bypassed, step.features

    def _keep(self, batch: Mapping[str, Any], inputs: Mapping[str, Any], kept: InMemory | InFile) -> HeadBatch:
        own = {name: value for name, value in batch.items() if name != self._main_input or stays_real(value)}
        main = inputs[self._main_input]
        if not stays_real(main):
            own[OWN_SIZE] = torch.empty(*main.shape, 0)
        return HeadBatch(own, len(main), kept)

    def _prove_later(
        self,
        proofs: list[_Proof],
        inputs: Mapping[str, Any],
        features: torch.Tensor,
        answer: Callable[[], Mapping[Path, torch.Tensor]],
    ) -> None:
        """Notes what the model answers on the first batches of other sizes than the recorded one.

        They are compared once others have run: what the model keeps from run to run shows then, too.
        """
        main = inputs[self._main_input]
        size, seen = tuple(main.shape[1:]), {tuple(proof.inputs[self._main_input].shape[1:]) for proof in proofs}
        if stays_real(main) or size == self.head.size or size in seen or len(seen) == _PROVED_SIZES:
            return
        others = {name: value for name, value in inputs.items() if name != self._main_input}
        own = with_main_input(self.context.chain, others, main.new_empty(*main.shape, 0))
        proofs.append(_Proof(own, features, answer()))
