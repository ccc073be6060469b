"""What the recipes share."""

import json
import logging
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


@contextmanager
def recipes_extra() -> Iterator[None]:
    """Ends the program with the command that installs the missing package, if an import in this block fails.

    For the packages of the extra `recipes`, which `hf_freezecache` itself does not need.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = error.name.partition(".")[0]
        raise SystemExit(f'The recipes need the package {package}: pip install -e ".[recipes]"') from error


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with one line where a user has made a mistake; the traceback is logged at debug level.

    A wrong setting, a missing file and a model or data that do not fit are `ValueError`, `TypeError` or `OSError`.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        logging.getLogger(__name__).debug("The error of the line below", exc_info=True)
        raise SystemExit(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}") from None


class Stopwatch(TrainerCallback):
    """Measures the seconds of training without evaluation, for any `Trainer`; building a store counts as training.

    After training, `seconds` is the total and `curve` holds one `{"epoch", "seconds", "accuracy"}` per evaluation.
    """

    def __init__(self):
        self.seconds = 0.0
        self.curve: list[dict[str, float]] = []
        self._started: float | None = None
        self._evaluating = 0.0

    def _elapsed(self) -> float:
        return time.perf_counter() - self._started - self._evaluating

    def on_train_begin(self, args, state, control, **kwargs):
        self._started, self._evaluating = time.perf_counter(), 0.0
        self.curve.clear()

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if self._started is None:
            return
        self._evaluating += metrics["eval_runtime"]
        self.curve.append({"epoch": state.epoch, "seconds": self._elapsed(), "accuracy": metrics.get("eval_accuracy")})

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds = self._elapsed()
        self._started = None


def peak_memory_bytes() -> int:
    """Peak memory of this process: allocated on the accelerator if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Linux states ru_maxrss in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
