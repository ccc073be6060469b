"""What a training step changes: enough to run it again, on one process alone too, or to tell that it cannot be."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed import Group, count_operations, find_ddp
from ..model.stand_ins import FrozenOutputError
from ..rng import RngState
from .proof import MismatchError

_Buffers = list[tuple[torch.Tensor, torch.Tensor]]
#: For how long a process waits for the others to fail in the same step: they have communicated in it just before.
_PATIENCE_SECONDS = 60.0


class StepState:
    """Generators, buffers (BatchNorm statistics) and gradients before a step.

    DistributedDataParallel sends the main process's buffers around before every forward pass. A process that runs its
    step again, where the others do not, would wait for them: it puts in once more what it got at the first try.

    Args:
        model: as the training calls it.
        buffers: that the step may change: those of the blocks that are not frozen.
        parameters: of the model, when the epoch began: to look for them takes longer than all else that is kept here.
        group: the processes.
    """

    def __init__(
        self, model: nn.Module, buffers: Sequence[torch.Tensor], parameters: Sequence[nn.Parameter], group: Group
    ):
        self._model, self._buffers, self._ddp, self._group = model, buffers, find_ddp(model), group
        self._rng, self._before = RngState(), self._copy()
        self._gradients = [(parameter, _version(parameter)) for parameter in parameters]
        # What the wrapper's forward passes of the first try have begun with.
        self._received: list[_Buffers] = []
        # Operations between processes: those before the step, and those of the wrapper's before its forward passes.
        self._operations, self._wrappers = count_operations(), 0

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Around the first try."""
        if self._ddp is None:
            yield
            return

        def begin() -> None:
            self._wrappers -= count_operations()

        def enter() -> None:
            self._wrappers += count_operations()
            self._received.append(self._copy())

        with _at_passes(self._ddp, begin, enter):
            yield

    def check_repeatable(self, error: FrozenOutputError) -> None:
        """Whether there may be a second try.

        A step that has communicated would do so again, and the others would take it for their next operation: there
        is a second try only if all processes have one.

        Args:
            error: what has ended the first one.

        Raises:
            MismatchError: if there may not.
        """
        if any(version and _version(parameter) != version for parameter, version in self._gradients):
            raise _not_again("it has added to gradients of the batches before it", error)
        known = {id(parameter) for parameter, _ in self._gradients}
        if any(each.grad is not None and id(each) not in known for each in self._model.parameters()):
            raise _not_again("parameters that were added since the epoch began have gradients", error)
        operations = count_operations()  # the same on processes that have come to the same place
        communicated = operations - self._operations - self._wrappers
        if communicated and not self._group.meet(f"freezecache/again after {operations}", _PATIENCE_SECONDS):
            raise _not_again("it has communicated with the other processes, which do not run it again", error)

    @contextlib.contextmanager
    def repeating(self) -> Iterator[None]:
        """Around the second try, which begins as the first one did."""
        self._rng.restore()
        _put_back(self._before)
        for parameter, version in self._gradients:
            if version is None:
                parameter.grad = None
        if self._ddp is None or not self._before:
            yield
            return
        ddp, syncs, received = self._ddp, self._ddp.broadcast_buffers, iter(self._received)
        current: _Buffers | None = None

        def begin() -> None:
            nonlocal current
            current = next(received, None)
            ddp.broadcast_buffers = syncs and current is None

        try:
            with _at_passes(ddp, begin, lambda: _put_back(current or [])):
                yield
        finally:
            ddp.broadcast_buffers = syncs

    def _copy(self) -> _Buffers:
        return [(buffer, buffer.clone()) for buffer in self._buffers]


def _not_again(why: str, error: FrozenOutputError) -> MismatchError:
    again = MismatchError(f"{error} This step cannot be run again on samples: {why}.")
    again.__cause__ = error
    return again


def _version(parameter: nn.Parameter) -> tuple[int, int] | None:
    """Changes with the values of a parameter's gradient; None if it has none."""
    return None if parameter.grad is None else (id(parameter.grad), parameter.grad._version)


def _put_back(buffers: _Buffers) -> None:
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)


@contextlib.contextmanager
def _at_passes(ddp: DistributedDataParallel, before: Callable[[], None], after: Callable[[], None]) -> Iterator[None]:
    """Inside, two functions are called at every forward pass: before and after the wrapper sends buffers around."""
    is_wrappers = False

    def begin(*_: object) -> None:
        nonlocal is_wrappers
        is_wrappers = True
        before()

    def enter(*_: object) -> None:  # also where somebody calls the model without its wrapper
        nonlocal is_wrappers
        if is_wrappers:
            is_wrappers = False
            after()

    # Before hooks of the user's, which may be what fails.
    handles = [ddp.register_forward_pre_hook(begin), ddp.module.register_forward_pre_hook(enter, prepend=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
