"""What a trainer remembers from step to step: counters, lists, running means, averaged models of the user's."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

#: Attributes that no training step changes, and which may be large.
_LEFT_OUT = ("train_dataset", "eval_dataset")
#: Containers with more entries are put back, but their entries are not looked at.
_MOST_ENTRIES = 10_000


@contextmanager
def remembering(trainer: Any, model: nn.Module) -> Iterator[None]:
    """Puts back on leaving what the code inside has changed in a trainer's attributes, in place or not.

    Numbers, containers, tensors and modules are put back, those of `compute_loss_func` included; other objects are
    left alone, as their state is their own affair (loggers, connections).

    Args:
        trainer: a `Trainer`.
        model: its model, not wrapped, which is left alone; so are modules with more parameters, which are no averages
            of it.
    """
    memory = _Memory(model)
    memory.keep_attributes(trainer)
    if trainer.compute_loss_func is not None:
        memory.keep_attributes(trainer.compute_loss_func)
    try:
        yield
    finally:
        memory.put_back()


class _Memory:
    def __init__(self, model: nn.Module):
        self._seen = {id(module) for module in model.modules()} | {id(value) for value in _tensors(model)}
        self._most = sum(value.numel() for value in _tensors(model))
        self._undo: list[Callable[[], None]] = []

    def keep_attributes(self, owner: Any) -> None:
        """Keeps the attributes of an object."""
        attributes = getattr(owner, "__dict__", None)
        if isinstance(owner, nn.Module):
            self.keep(owner)
        elif isinstance(attributes, dict):
            self._undo.append(_dict_undo(attributes))
            for name, value in list(attributes.items()):
                if name not in _LEFT_OUT:
                    self.keep(value)

    def keep(self, value: Any) -> None:
        """Keeps a value, and what it contains."""
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, torch.Tensor):
            self._undo.append(_tensor_undo(value))
        elif isinstance(value, nn.Module):
            tensors = _tensors(getattr(value, "module", value))
            if sum(tensor.numel() for tensor in tensors) <= self._most:
                for tensor in tensors:
                    self.keep(tensor)
        elif isinstance(value, dict):
            self._undo.append(_dict_undo(value))
            self._keep_entries(value.values())
        elif isinstance(value, list | deque | set):
            self._undo.append(_sequence_undo(value))
            self._keep_entries(value)
        elif isinstance(value, tuple):
            self._keep_entries(value)

    def put_back(self) -> None:
        """Puts everything back."""
        with torch.no_grad():
            for undo in self._undo:
                undo()

    def _keep_entries(self, entries: Any) -> None:
        if len(entries) <= _MOST_ENTRIES:
            for entry in list(entries):
                self.keep(entry)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _tensor_undo(tensor: torch.Tensor) -> Callable[[], None]:
    before = tensor.detach().clone()

    def undo() -> None:
        if tensor.shape == before.shape and not torch.equal(tensor.detach(), before):
            tensor.copy_(before)

    return undo


def _dict_undo(values: dict) -> Callable[[], None]:
    before = list(values.items())

    def undo() -> None:
        if len(values) != len(before) or any(values.get(name, values) is not value for name, value in before):
            values.clear()
            values.update(before)

    return undo


def _sequence_undo(values: Any) -> Callable[[], None]:
    before = list(values)

    def undo() -> None:
        if len(values) != len(before) or any(one is not other for one, other in zip(values, before, strict=True)):
            values.clear()
            (values.update if isinstance(values, set) else values.extend)(before)

    return undo
