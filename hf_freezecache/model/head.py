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

    def features(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """What the head gets, in eval mode and without gradients.

        Args:
            inputs: model inputs by name.

        Returns:
            `(B, *cut.layout.shape)`; of several texts with padding.

        Shapes: B samples.
        """
        with torch.no_grad(), eval_mode(self._chain.model):
            return capture(self._chain.model, self._trace, self._number, inputs)

    def prove(self, inputs: Mapping[str, Any]) -> None:
        """Checks on a batch that the head alone answers as the whole model does.

        Raises:
            ChainError: if it does not: something besides the feature reaches it.
        """
        model, features = self._chain.model, self.features(inputs)
        main_input = self._chain.input_of_replay(features, inputs)
        with torch.no_grad(), eval_mode(model):
            expected = answers_of(model(**inputs))
            with self.replay(features, main_input):
                found = answers_of(model(**{**inputs, self._chain.main_input: main_input}))
        if not are_close(expected, found):
            raise ChainError(f"the head of {type(model).__name__} alone does not answer as the whole model does.")

    @contextlib.contextmanager
    def replay(self, features: torch.Tensor, main_input: torch.Tensor) -> Iterator[None]:
        """Inside, the model runs its head alone.

        Args:
            features: of a batch, as `features` returned them.
            main_input: what `BlockChain.input_of_replay` returned for the batch.
        """
        with Bypass(self._trace, self.cut, features, main_input).active(self._chain.model):
            yield
