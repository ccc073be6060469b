"""Replacing single calls of a model's modules while the model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from .modes import override_forward
from .record import Call, Record

#: What is done in place of a call: it gets the module's own `forward` and the arguments.
Action = Callable[[Callable, tuple, dict], Any]


@contextlib.contextmanager
def replacing(
    model: nn.Module, record: Record, actions: Mapping[Call, Action], skipped: Sequence[Call] = ()
) -> Iterator[None]:
    """Inside, actions are done in place of some calls of each run of the model.

    Calls are told apart by how often their module was called before in the same run. A module that runs once is
    replaced whenever it is called: activation checkpointing calls it again in the backward pass.

    Args:
        model: the model.
        record: its recorded run.
        actions: what to do in place of a call.
        skipped: calls that do not happen because something else replaces them, with all calls within them.
    """
    live = record.live_calls(tuple(skipped))
    counts: dict[nn.Module, int] = {}

    def begin(original: Callable) -> Callable:
        def forward(*args, **kwargs):
            counts.clear()
            return original(*args, **kwargs)

        return forward

    def choose(module: nn.Module) -> Callable[[Callable], Callable]:
        calls = live[module]

        def wrap(original: Callable) -> Callable:
            def forward(*args, **kwargs):
                number = counts.get(module, 0) if len(calls) > 1 else 0
                counts[module] = number + 1
                action = actions.get(calls[number]) if number < len(calls) else None
                return original(*args, **kwargs) if action is None else action(original, args, kwargs)

            return forward

        return wrap

    with contextlib.ExitStack() as stack:
        for module in dict.fromkeys(call.module for call in actions):
            stack.enter_context(override_forward(module, choose(module)))
        stack.enter_context(override_forward(model, begin))
        yield
