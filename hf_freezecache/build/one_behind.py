"""Work that follows a loop in a thread of its own, one round behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from transformers.utils import logging

from ..distributed import Announcer

logger = logging.get_logger(__name__)


class OneBehind(contextlib.AbstractContextManager):
    """Runs functions one after the other in a thread, while the caller prepares the next one.

    At most one is under way, so that what it holds is in memory once beside what the caller makes. They run without
    gradients, and on CUDA and ROCm in the caller's stream, behind what the caller has started there before. An error
    of one is raised at the next call, or on leaving the context.

    Args:
        is_beside: whether they run in a thread; else the caller waits for each.
    """

    def __init__(self, is_beside: bool = True) -> None:
        self._is_beside = is_beside
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hf_freezecache")
        self._running: Future[None] | None = None

    def run(self, function: Callable[..., None], *args: Any) -> None:
        """Waits for the function before, and starts this one.

        Raises:
            Exception: what the function before has raised.
        """
        self.wait()
        if not self._is_beside:
            function(*args)
            return
        stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
        self._running = self._thread.submit(_in_stream, stream, function, args)

    def wait(self) -> None:
        """Waits for the last function.

        Raises:
            Exception: what it has raised.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def __exit__(self, kind, error, traceback):
        try:
            self.wait()
        except Exception as late:
            if error is None:
                raise
            Announcer.survived(logger, "What was being written has failed, too", late)
        finally:
            self._thread.shutdown()


def _in_stream(stream: torch.cuda.Stream | None, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    # A thread begins with the first device and its default stream.
    with torch.cuda.stream(stream), torch.no_grad():
        function(*args)
