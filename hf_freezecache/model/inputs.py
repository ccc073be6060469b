"""Which entries of a collated batch a model takes for its prefix."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..rng import preserve_rng
from .modes import eval_mode

logger = logging.get_logger(__name__)


class ModelInputs:
    """Makes the prefix's inputs of a collated batch: the entries that it takes, on the model's device.

    Labels belong to the loss, which may be the user's own: the prefix gets them only if the model cannot run without.

    Args:
        model: the model itself, not wrapped.
        prepare: makes the model's inputs of a batch, by name and on the model's device.
        label_names: entries that only the loss takes.
    """

    def __init__(
        self,
        model: nn.Module,
        prepare: Callable[[Any], Mapping[str, Any]],
        label_names: Sequence[str] = (),
    ):
        self.model, self.prepare, self.label_names = model, prepare, frozenset(label_names)
        # From the class: a forward that was put on the instance may have lost its signature.
        parameters = inspect.signature(type(model).forward).parameters
        self._accepted = frozenset(parameters)
        self._accepts_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())

    def __call__(self, batch: Any) -> Mapping[str, Any]:
        """The prefix's inputs by name, on the model's device."""
        # All of it is prepared: what users do there may look at labels, too.
        prepared = self.prepare(dict(batch) if isinstance(batch, Mapping) else batch)
        return {name: value for name, value in prepared.items() if self._takes(name)}

    def with_other_labels(self, batch: Any) -> Mapping[str, Any] | None:
        """What the model takes of a batch, with each sample's labels at the next one; None if it takes none.

        Args:
            batch: of several samples, with one label or a row of labels for each.
        """
        prepared = self.prepare(dict(batch) if isinstance(batch, Mapping) else batch)
        taken = {name: value for name, value in prepared.items() if self._accepts_all or name in self._accepted}
        labels = {name: value for name, value in taken.items() if name in self.label_names}
        rolled = {
            name: value.roll(1, 0) for name, value in labels.items() if isinstance(value, torch.Tensor) and value.ndim
        }
        return {**taken, **rolled} if rolled else None

    def include_labels_if_needed(self, batch: Any) -> None:
        """Runs the model without labels; from then on the prefix gets them if that fails and running with them works.

        Raises:
            Exception: whatever the model raises with its labels, as in a training, if it runs in neither way.
        """
        without_labels = self.label_names
        try:
            self._run(batch)
        except Exception as error:  # whatever a model raises that misses its labels
            why = f"{type(error).__name__}: {error}"
        else:
            return
        self.label_names = frozenset()
        try:
            self._run(batch)
        except BaseException:
            self.label_names = without_labels
            raise
        logger.info(
            f"{type(self.model).__name__} does not run without its labels ({why}): its frozen blocks get them too."
        )

    def _takes(self, name: str) -> bool:
        return name not in self.label_names and (self._accepts_all or name in self._accepted)

    def _run(self, batch: Any) -> None:
        with preserve_rng(), torch.no_grad(), eval_mode(self.model):
            self.model(**self(batch))


def main_input_name(model: nn.Module) -> str:
    """`model.main_input_name`, or the first argument of its `forward`."""
    name = getattr(model, "main_input_name", None)
    return name if name is not None else argument_names(model)[0]


def argument_names(model: nn.Module) -> list[str]:
    """Names of the arguments of `forward`, from the class: an override on the instance may have lost its signature."""
    return list(inspect.signature(type(model).forward).parameters)[1:]
