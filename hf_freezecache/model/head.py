"""The head of a model: what is trained alone, on features of all that runs before it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .bypass import Bypass
from .capture import capture
from .chain import BlockChain
from .errors import ChainError
from .freshness import is_fresh
from .modes import eval_mode
from .proving import are_close
from .record import answers_of
from .resizing import resize
from .stand_ins import stays_real
from .structure import Path
from .trace import Cut


class Head:
    """Parameters behind the last block, and the boundary before the first of them.

    Its feature is what this part gets: of a classifier one vector for each sample, where the last cut of the chain has
    all tokens.

    Args:
        chain: the model, traced.
        is_new: whether only what is fresh belongs to it (`freshness.is_fresh`), as the new classifier of a pretrained
            model; else everything behind the last block.

    Attributes:
        parameters: trainable ones, by name; empty if there is no such head.

    Raises:
        ChainError: if the model cannot be cut before them; the message names what crosses.
    """

    def __init__(self, chain: BlockChain, is_new: bool):
        self._chain, self._trace = chain, chain.own_trace()
        before = chain.prefix_parameters(len(chain)).keys()
        self.parameters: dict[str, nn.Parameter] = {
            f"{module_name}.{name}" if module_name else name: parameter
            for module_name, module in chain.model.named_modules()
            if not is_new or is_fresh(module)
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad and (f"{module_name}.{name}" if module_name else name) not in before
        }
        self._number = self._trace.add_cut_before(self.parameters) if self.parameters else 0

    @property
    def cut(self) -> Cut:
        """What is known of the boundary."""
        return self._trace.cut(self._number)

    def features(self, inputs: Mapping[str, Any], cut: int = 0, known: torch.Tensor | None = None) -> torch.Tensor:
        """What the head gets, in eval mode and without gradients.

        Args:
            inputs: model inputs by name, of any size.
            cut: of the chain, up to which the model does not run, as the feature there is known.
            known: the feature at this cut; the main input is what `BlockChain.input_of_replay` returned then.

        Returns:
            `(B, *cut.layout.shape)`; of inputs of another size than the recorded ones in their own shape.

        Raises:
            ChainError: if the model does not run on inputs of this size.

        Shapes: B samples.
        """
        model, main_input = self._chain.model, inputs[self._chain.main_input]
        skipped = self._trace.cut(cut).boundary.skipped if cut else ()
        with torch.no_grad(), eval_mode(model), self._chain.replay(cut, known, main_input):
            features = capture(model, self._trace, self._number, inputs, skipped)
        self.fit(features, inputs)
        return features

    def fit(self, features: torch.Tensor, inputs: Mapping[str, Any]) -> None:
        """Makes replays fit inputs of this size.

        Of texts the width of what is left out counts only where it is that of the feature, too.

        Args:
            features: of a batch.
            inputs: of the model for it; of a main input of floating-point numbers the shape alone counts.

        Raises:
            ChainError: if the model does not run on inputs of this size.
        """
        grows = self.cut.has_tokens or tuple(features.shape[1:]) == self.cut.layout.shape
        if not (stays_real(inputs[self._chain.main_input]) and grows):
            resize(self._chain.model, self._trace, self._number, inputs)

    @property
    def size(self) -> tuple[int, ...]:
        """Shape of the main input of a recorded sample."""
        return self._trace.size

    def fits(self, size: tuple[int, ...]) -> bool:
        """Whether replays fit main inputs of this shape."""
        return size == self._trace.size or (self._number, size) in self._trace.resized

    def answers(
        self, inputs: Mapping[str, Any], cut: int = 0, known: torch.Tensor | None = None
    ) -> dict[Path, torch.Tensor]:
        """What the model answers, in eval mode and without gradients; the arguments are those of `features`."""
        model, main_input = self._chain.model, inputs[self._chain.main_input]
        with torch.no_grad(), eval_mode(model), self._chain.replay(cut, known, main_input):
            return answers_of(model(**inputs))

    def prove(self, inputs: Mapping[str, Any]) -> None:
        """Checks on a batch that the head alone answers as the whole model does.

        Raises:
            ChainError: as `compare`.
        """
        self.compare(inputs, self.features(inputs), self.answers(inputs))

    def compare(
        self, inputs: Mapping[str, Any], features: torch.Tensor, expected: Mapping[Path, torch.Tensor]
    ) -> None:
        """Compares what the head alone answers on a batch with what the whole model has answered.

        Args:
            inputs: model inputs by name; of a main input of floating-point numbers the shape alone counts.
            features: what the head gets.
            expected: what `answers` returned.

        Raises:
            ChainError: if it does not: something besides the feature reaches it.
        """
        model = self._chain.model
        main_input = self._chain.input_of_replay(features, inputs)
        with torch.no_grad(), eval_mode(model), self.replay(features, main_input):
            found = answers_of(model(**{**inputs, self._chain.main_input: main_input}))
        if not are_close(expected, found):
            shape = tuple(main_input.shape[1:])
            raise ChainError(
                f"the head of {type(model).__name__} alone does not answer as the whole model does, on samples of "
                f"shape {shape}. head_start_epochs=0 is without a head start."
            )

    @contextlib.contextmanager
    def replay(self, features: torch.Tensor, main_input: torch.Tensor) -> Iterator[None]:
        """Inside, the model runs its head alone.

        Args:
            features: of a batch, as `features` returned them.
            main_input: what `BlockChain.input_of_replay` returned for the batch.
        """
        resized = self._trace.resized.get((self._number, tuple(main_input.shape[1:])))
        with Bypass(self._trace, self.cut, features, main_input, resized).active(self._chain.model):
            yield
