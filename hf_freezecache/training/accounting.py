"""Seconds, FLOPs, bytes and peak memory, by phase of a training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from ..estimate.pace import Pace
from ..model.chain import BlockChain
from .flops import FlopMeter
from .live_clock import LiveClock


@dataclass
class Phase:
    """What was done at one cut in one mode.

    Args:
        cut: frozen blocks.
        mode: live, build, replay, eval, head_start, trial (of frozen blocks before the first step), or plan: what it
            took to find out that no store is built.
        epochs: finished epochs (passes over the data for build and eval).
        steps: optimizer steps.
        seconds: wall-clock seconds; evaluation and builds inside an epoch count for themselves only.
        flops: floating-point operations of this process.
        store_bytes: size of the Arrow files that were written or replayed.
        peak_memory_bytes: largest memory seen: the accelerator's where there is one, otherwise the process's anonymous
            memory, sampled once a step.
    """

    cut: int
    mode: str
    epochs: int = 0
    steps: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    store_bytes: int = 0
    peak_memory_bytes: int = 0

    def add_store(self, store_bytes: int) -> None:
        """Books a store that was built in this phase beside others."""
        self.epochs += 1
        self.store_bytes += store_bytes

    def set_store(self, store_bytes: int) -> None:
        """Books the store of this phase; one that is built again takes the place of the one before."""
        self.epochs += 1
        self.store_bytes = store_bytes


class Ledger:
    """Books what happens while a phase is open; phases nest, and only the innermost one's clock runs."""

    def __init__(self):
        self._phases: dict[tuple[int, str], Phase] = {}
        self._open: list[Phase] = []
        self._since = 0.0

    @property
    def phases(self) -> list[Phase]:
        """All phases in the order in which they began."""
        return list(self._phases.values())

    @property
    def training_steps(self) -> int:
        """Optimizer steps of the training, of all cuts."""
        return sum(phase.steps for phase in self.phases if phase.mode in ("live", "replay"))

    def begin(self, cut: int, mode: str) -> Phase:
        """Opens a phase; the surrounding one's clock stops until `end`."""
        self.settle()
        phase = self._phases.setdefault((cut, mode), Phase(cut, mode))
        self._open.append(phase)
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        self.sample_memory()
        return phase

    def end(self) -> None:
        """Closes the innermost phase."""
        self.sample_memory(ends=True)
        self.settle()
        self._open.pop()

    def end_all(self) -> None:
        """Closes whatever is open: a training that was broken off leaves phases open."""
        while self._open:
            self.end()

    @contextlib.contextmanager
    def phase(self, cut: int, mode: str) -> Iterator[Phase]:
        """A phase for the length of a block."""
        phase = self.begin(cut, mode)
        try:
            yield phase
        finally:
            if self._open and self._open[-1] is phase:
                self.end()

    def rename(self, phase: Phase, mode: str) -> None:
        """Books a phase that has ended under another mode, with what was booked there before."""
        del self._phases[phase.cut, phase.mode]
        other = self._phases.setdefault((phase.cut, mode), Phase(phase.cut, mode))
        other.seconds += phase.seconds
        other.flops += phase.flops
        other.peak_memory_bytes = max(other.peak_memory_bytes, phase.peak_memory_bytes)

    def drop(self, phase: Phase) -> None:
        """Forgets a phase that has ended and in which nothing was done."""
        del self._phases[phase.cut, phase.mode]

    @property
    def current(self) -> Phase | None:
        """The innermost open phase."""
        return self._open[-1] if self._open else None

    def sample_memory(self, ends: bool = False) -> None:
        """Notes the memory in use for the open phase; an accelerator remembers its peak itself."""
        if self._open and (ends or not torch.cuda.is_initialized()):
            self._open[-1].peak_memory_bytes = max(self._open[-1].peak_memory_bytes, memory_in_use())

    def state_dict(self) -> list[dict[str, Any]]:
        """The phases as JSON values, up to this moment."""
        self.settle()
        return [asdict(phase) for phase in self.phases]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Continues from `state_dict()`."""
        self._phases = {(entry["cut"], entry["mode"]): Phase(**entry) for entry in state}

    def settle(self) -> None:
        """Books the seconds of the open phase up to now."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._open:
            self._open[-1].seconds += now - self._since
        self._since = now


def memory_in_use() -> int:
    """Peak accelerator memory since the phase began, or the process's anonymous memory (mapped files do not count)."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return psutil.Process().memory_info().rss


class Accounts:
    """The ledger, the FLOPs and the clock of one training.

    Args:
        chain: the model.
        probe: a small batch of model inputs.
    """

    def __init__(self, chain: BlockChain, probe: Mapping[str, Any]):
        self.ledger, self.meter, self.clock = Ledger(), FlopMeter(chain, probe), LiveClock()

    def begin_epoch(self, cut: int, mode: str) -> Phase:
        """Opens the phase of an epoch."""
        phase = self.ledger.begin(cut, mode)
        self.clock.begin(phase.seconds)
        return phase

    def end_epoch(self) -> None:
        """Closes the phase of an epoch; a live one tells how fast live epochs are."""
        phase = self.ledger.current
        self.ledger.end()
        if phase is not None and phase.mode == "live":
            self.clock.end(phase.cut, phase.seconds)

    def pace(self, cut: int, workers: int) -> Pace | None:
        """How fast the last live epoch ran, and what of it a store at a cut would spare; None if there was none.

        Args:
            cut: frozen blocks of the store.
            workers: loader processes.
        """
        lap = self.clock.last
        if lap is None:
            return None
        share = self.meter.share_of_prefix(cut, lap.cut)
        return Pace(lap.step, lap.load(workers), lap.start(workers), share)

    @contextlib.contextmanager
    def building(self, cut: int) -> Iterator[Phase]:
        """A build phase for the length of a block, with the FLOPs of what was run for it."""
        with self.ledger.phase(cut, "build") as phase:
            try:
                yield phase
            finally:
                self.meter.book_builds(phase)

    def book_samples(self, inputs: Mapping[str, Any]) -> None:
        """Books a forward pass of the whole model beside the steps of the running phase.

        Args:
            inputs: that the model has run on.
        """
        samples = len(inputs[self.meter.chain.main_input]) * self.meter.relative(self.meter.width_of(inputs))
        flops = self.meter.per_sample("eval") * samples
        self.meter.book(flops)
        if self.ledger.current is not None:
            self.ledger.current.flops += flops

    def decline(self, phase: Phase) -> None:
        """Books a build phase as a plan: it has come to no store."""
        if not phase.epochs:
            self.ledger.rename(phase, "plan")
