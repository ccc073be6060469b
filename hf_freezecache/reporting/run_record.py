"""The record of a training as a file: what happened when, what it has cost, and what it was made with."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

#: Name of the file in a training's output folder.
RECORD = "freeze_cache_report.json"
#: Version of the file.
FORMAT = 1
#: The largest file that is read: far more than the logs of any training.
_MOST_BYTES = 1 << 28
#: Logged numbers that are no metric of the model.
_NO_METRIC = (
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "loss",
    "epoch",
    "jit_compilation_time",
    "model_preparation_time",
)


class RecordError(ValueError):
    """A file is not the record of a training; the message says why and what to do."""


@dataclass(frozen=True)
class RunRecord:
    """A training, as its file tells it.

    Args:
        run: what was trained, with which settings, on which machine, as text and numbers by name.
        blocks: module names of the blocks, stem first.
        epochs: one entry a begun epoch: `epoch`, `cut`, `mode` (live or replay), `begin` and `end` in seconds since
            the training began, `steps`, `store_bytes`.
        logs: what was logged: `seconds` since the training began, `step`, `epoch`, and numbers by name.
        notes: what the training has said of its stores and decisions: `seconds`, `epoch`, `text`.
        phases: what was done at each cut in each mode, see `FreezeCacheReport`.
        totals: their sums.
        plain_estimate: seconds and FLOPs of the same steps without freezing, as far as they can be told.
        store: facts of the last store, by name; None if there was none.
        note: why nothing was booked; None if something was.
        learning_rates: what was done to the learning rates of blocks; None if nothing was.
        choice: the schedule that the policy has chosen, and why, see `policies.trial.Choice`; None if it did not.
    """

    run: Mapping[str, Any]
    blocks: Sequence[str]
    epochs: Sequence[Mapping[str, Any]]
    logs: Sequence[Mapping[str, Any]]
    notes: Sequence[Mapping[str, Any]]
    phases: Sequence[Mapping[str, Any]]
    totals: Mapping[str, Any]
    plain_estimate: Mapping[str, Any]
    store: Mapping[str, Any] | None = None
    note: str | None = None
    learning_rates: str | None = None
    choice: Mapping[str, Any] | None = None
    format: int = field(default=FORMAT)

    @property
    def name(self) -> str:
        """For people."""
        return str(self.run.get("name", "training"))

    @property
    def metric(self) -> str | None:
        """Name of the first metric of evaluations that is neither the loss nor a time; None if there is none."""
        return next(iter(self.metrics), None)

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics of evaluations that are neither a loss nor a time, in the order of the logs."""
        names = dict.fromkeys(name for entry in self.logs for name in entry if name.startswith("eval_"))
        return [name for name in names if not name.endswith(_NO_METRIC)]

    def curve(self, name: str) -> list[tuple[float, float, float]]:
        """Where a number was logged: seconds, epoch and value, in order."""
        return [(entry["seconds"], entry["epoch"], entry[name]) for entry in self.logs if name in entry]

    @property
    def training_seconds(self) -> float:
        """Seconds of the training with all that was done for it, evaluations apart."""
        names = ("train_seconds", "build_seconds", "plan_seconds", "head_start_seconds", "trial_seconds")
        return sum(self.totals.get(name, 0.0) for name in names)

    def write(self, folder: str | os.PathLike) -> Path:
        """Writes the file in a folder, whole or not at all.

        Raises:
            OSError: if it cannot be written.
        """
        path = Path(folder) / RECORD
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(_without_nan(asdict(self)), indent=1), encoding="utf-8")
        os.replace(aside, path)
        return path


def read_record(path: str | os.PathLike) -> RunRecord:
    """The record of a training.

    Args:
        path: its output folder, or the file.

    Raises:
        RecordError: if there is none, or it is not one that this version can read.
        OSError: if the file cannot be read.
    """
    path = Path(path)
    file = path / RECORD if path.is_dir() else path
    if not file.is_file():
        raise RecordError(
            f"{path} has no {RECORD}: name the output folder of a training, with report='json' or 'html'."
        )
    if file.stat().st_size > _MOST_BYTES:
        raise RecordError(f"{file} is larger than any record of a training ({file.stat().st_size} bytes).")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{file} is no record of a training: {error}.") from error
    problem = _problem(content)
    if problem is not None:
        raise RecordError(f"{file} is no record of a training that this version reads: {problem}.")
    return RunRecord(**{name: value for name, value in content.items() if name in RunRecord.__dataclass_fields__})


def _problem(content: Any) -> str | None:
    if not isinstance(content, dict):
        return "it is not an object"
    if content.get("format") != FORMAT:
        return f"its format is {content.get('format')!r} in place of {FORMAT}"
    kinds = [(("run", "totals", "plain_estimate"), dict), (("blocks", "epochs", "logs", "notes", "phases"), list)]
    for names, kind in kinds:
        for name in names:
            if not isinstance(content.get(name), kind):
                return f"its `{name}` is missing or of another kind"
    numbers = {
        "epochs": ("epoch", "cut", "begin", "end", "steps", "store_bytes"),
        "logs": ("seconds", "epoch"),
        "notes": ("seconds", "epoch"),
        "phases": ("cut", "epochs", "steps", "seconds", "flops", "store_bytes", "peak_memory_bytes"),
    }
    texts = {"epochs": "mode", "notes": "text", "phases": "mode"}
    for name, needed in numbers.items():
        for entry in content[name]:
            if not isinstance(entry, dict) or not all(is_number(entry.get(number)) for number in needed):
                return f"an entry of `{name}` lacks one of the numbers {', '.join(needed)}"
            if name in texts and not isinstance(entry.get(texts[name]), str):
                return f"an entry of `{name}` lacks the text {texts[name]}"
            if name == "logs" and not all(is_number(value) for value in entry.values()):
                return "a logged value is not a number"
    estimates = [value for value in content["plain_estimate"].values() if value is not None]
    if not all(is_number(value) for value in [*content["totals"].values(), *estimates]):
        return "a total is not a number"
    store = content.get("store") or {}
    if not isinstance(store, dict) or not all(is_number(store[name]) for name in store if name.endswith("bytes")):
        return "its `store` is of another kind"
    return None


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and no larger than those of floating point."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are left out of logs, and nothing elsewhere."""
    if isinstance(value, Mapping):
        kept = {name: _without_nan(part) for name, part in value.items()}
        return {name: part for name, part in kept.items() if part is not None or value[name] is None}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
