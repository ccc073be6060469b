"""What happens in a training, with the seconds since it began: epochs, logged numbers, and what it says."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..reporting.run_record import is_number


class Journal:
    """Notes of one training on one process; a resumed training goes on with the notes of its checkpoint.

    Attributes:
        epochs, notes: see `reporting.run_record.RunRecord`.
    """

    def __init__(self):
        self.epochs: list[dict[str, Any]] = []
        self.notes: list[dict[str, Any]] = []
        self._before, self._began = 0.0, time.perf_counter()
        self._epoch = 0
        # Of each entry of `Trainer`'s log history.
        self._logged: list[float] = []

    @property
    def seconds(self) -> float:
        """Seconds since the training began, without those between a checkpoint and its resume."""
        return self._before + time.perf_counter() - self._began

    def begin_epoch(self, epoch: int, cut: int, mode: str, store_bytes: int) -> None:
        """An epoch's first batch comes next."""
        self._epoch, now = epoch, self.seconds
        if self.epochs and self.epochs[-1]["epoch"] == epoch:  # resumed in the middle of it
            self.epochs[-1].update(cut=cut, mode=mode, store_bytes=store_bytes)
            return
        entry = {"epoch": epoch, "cut": cut, "mode": mode, "begin": now, "end": now, "steps": 0}
        self.epochs.append({**entry, "store_bytes": store_bytes})

    def end_step(self) -> None:
        """An optimizer step is done."""
        if self.epochs:
            self.epochs[-1]["steps"] += 1
            self.epochs[-1]["end"] = self.seconds

    def log(self, entries: int) -> None:
        """The trainer has logged something.

        Args:
            entries: length of its log history by now.
        """
        self._logged += [round(self.seconds, 3)] * (entries - len(self._logged))

    def logs(self, history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The trainer's log history with the seconds at which its entries were made; finite numbers alone.

        Args:
            history: of the trainer.
        """
        entries = []
        for seconds, values in zip(self._logged, history, strict=False):
            numbers = {name: value for name, value in values.items() if is_number(value)}
            entries.append({"epoch": 0.0, **numbers, "seconds": seconds})
        return entries

    def note(self, text: str) -> None:
        """Something that the training says."""
        self.notes.append({"seconds": self.seconds, "epoch": self._epoch, "text": text})

    def state_dict(self) -> dict[str, Any]:
        """The notes as JSON values, up to this moment."""
        return {"seconds": self.seconds, "epochs": self.epochs, "logged": self._logged, "notes": self.notes}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Continues from `state_dict()`; checkpoints of earlier versions have none."""
        if state is None:
            return
        later = self.notes  # said since this training began
        self._before, self._began = state["seconds"], time.perf_counter()
        self.epochs, self._logged = list(state["epochs"]), list(state["logged"])
        self.notes = [*state["notes"], *({**note, "seconds": state["seconds"]} for note in later)]
