"""FLOPs, seconds, bytes and peak memory, by phase of a training."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ..estimate.pace import Pace
from ..model.chain import BlockChain
from ..model.inputs import main_input_name
from ..model.modes import eval_mode
from ..model.structure import first_tensor
from ..rng import preserve_rng
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

    def begin(self, cut: int, mode: str) -> Phase:
        """Opens a phase; the surrounding one's clock stops until `end`."""
        self._settle()
        phase = self._phases.setdefault((cut, mode), Phase(cut, mode))
        self._open.append(phase)
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        self.sample_memory()
        return phase

    def end(self) -> None:
        """Closes the innermost phase."""
        self.sample_memory(ends=True)
        self._settle()
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
        self._settle()
        return [asdict(phase) for phase in self.phases]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Continues from `state_dict()`."""
        self._phases = {(entry["cut"], entry["mode"]): Phase(**entry) for entry in state}

    def _settle(self) -> None:
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


# `FlopCounterMode` does not know the kernel that attention uses on the CPU: 13 % of a ViT would be missing.


def _cpu_attention(query, key, value, *args, out_val=None, **kwargs) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _cpu_attention_backward(grad_out, query, key, value, *args, out_val=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad_out.shape, query.shape, key.shape, value.shape)


# The mark by which `FlopCounterMode` passes tensors, not shapes.
_cpu_attention._get_raw = _cpu_attention_backward._get_raw = True  # type: ignore[attr-defined]
_CPU_KERNELS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


class _OfAllModules(contextlib.nullcontext):
    """In place of the tracker of modules: nobody asks for their shares, and it takes as long as counting."""

    parents = frozenset({"Global"})


@contextlib.contextmanager
def counting_flops() -> Iterator[FlopCounterMode]:
    """Counts the operations of everything that runs inside; read them with `get_total_flops()`."""
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_KERNELS)
    counter.mod_tracker = _OfAllModules()  # type: ignore[assignment]  # it asks for `parents` alone
    with preserve_rng(), counter:
        yield counter


def measure_training_flops(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """FLOPs of one sample's share of a training step: forward, and backward to the parameters that are trainable now.

    Runs on `inputs` in eval mode (the same operations) and leaves gradients, buffers and generators as they were.
    The optimizer's own operations are not counted.

    Args:
        model: the model, not wrapped.
        inputs: a small batch of model inputs; the first dimension of the main input counts samples.
    """
    batch_size = len(inputs[main_input_name(model)])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with eval_mode(model), torch.enable_grad(), counting_flops() as counter:
        output = first_tensor(model(**inputs))
        if parameters and output.requires_grad:
            torch.autograd.grad(output.float().sum(), parameters, allow_unused=True)
    return counter.get_total_flops() // batch_size


def measure_forward_flops(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """FLOPs of one sample's forward pass."""
    with eval_mode(model), torch.no_grad(), counting_flops() as counter:
        model(**inputs)
    return counter.get_total_flops() // len(inputs[main_input_name(model)])


class FlopMeter:
    """FLOPs of a training: one sample's in every way to run the model, measured once each, and how many samples ran.

    Args:
        chain: the model.
        probe: a small batch of model inputs.

    Attributes:
        samples: samples of the training steps so far, of this process.
    """

    def __init__(self, chain: BlockChain, probe: Mapping[str, Any]):
        self.chain, self.probe = chain, probe
        self.samples = 0
        self._per_sample: dict[tuple[int, str], float] = {}
        self._runs: Counter[tuple[int, int]] = Counter()
        self._unreported = 0.0

    def per_sample(self, mode: str, cut: int | None = None) -> float:
        """FLOPs of one sample.

        Args:
            mode: a training step (live, replay), a build, or an evaluation (eval, eval_replay).
            cut: frozen blocks; the chain's cut if None.
        """
        cut = self.chain.cut if cut is None else cut
        if (cut, mode) not in self._per_sample:
            with preserve_rng():
                self._per_sample[cut, mode] = self._measure(mode, cut)
        return self._per_sample[cut, mode]

    def share_of_prefix(self, cut: int, live_cut: int) -> float:
        """FLOPs of a forward pass up to a cut, relative to those of a training step at an earlier cut, 1 at most.

        Args:
            cut: frozen blocks.
            live_cut: at which live steps have run.
        """
        live = self._per_sample.get((live_cut, "live"))
        return min(1.0, self.per_sample("build", cut) / live) if live else 1.0

    def step(self, mode: str, samples: int) -> float:
        """FLOPs of a training step's micro-batch, whose samples are counted."""
        self.samples += samples
        return self.per_sample(mode) * samples

    def plain_per_step(self, steps: int) -> float | None:
        """FLOPs of an average optimizer step at cut 0; None if nothing was trained or cut 0 was never measured."""
        plain = self._per_sample.get((0, "live"))
        return None if plain is None or not steps else plain * self.samples / steps

    def count_run(self, from_cut: int, to_cut: int, samples: int) -> None:
        """Counts samples on which a build has run the blocks between two cuts."""
        self._runs[from_cut, to_cut] += samples

    def book_builds(self, phase: Phase) -> None:
        """Books the runs that were counted since the last call."""
        for (start, end), samples in self._runs.items():
            before = self.per_sample("build", start) if start else 0.0
            flops = (self.per_sample("build", end) - before) * samples
            phase.flops += flops
            self._unreported += flops
        self._runs.clear()

    def book(self, flops: float) -> None:
        """Counts FLOPs beside those of training steps."""
        self._unreported += flops

    def take_build_flops(self) -> float:
        """FLOPs of builds and head start since the last call, for `total_flos`."""
        flops, self._unreported = self._unreported, 0.0
        return flops

    def state_dict(self) -> dict[str, Any]:
        """JSON values to continue from."""
        return {"samples": self.samples, "plain_flops_per_sample": self._per_sample.get((0, "live"))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict()`."""
        self.samples = state["samples"]
        if state["plain_flops_per_sample"] is not None:
            self._per_sample[0, "live"] = state["plain_flops_per_sample"]

    def _measure(self, mode: str, cut: int) -> float:
        model = self.chain.model
        if mode == "live":
            return measure_training_flops(model, self.probe)
        if mode == "eval":
            return measure_forward_flops(model, self.probe)
        if mode == "build":
            features = self.chain.prefix(self.probe, cut)  # traced and proved, which must not count
            with eval_mode(model), torch.no_grad(), counting_flops() as counter:
                self.chain.capture(self.probe, cut)
            return counter.get_total_flops() / len(features)
        features = self.chain.prefix(self.probe, cut)
        measure = measure_forward_flops if mode == "eval_replay" else measure_training_flops
        main_input = self.chain.input_of_replay(features, self.probe)
        with self.chain.replay(cut, features, main_input):
            return measure(model, {**self.probe, self.chain.main_input: main_input})


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

    def decline(self, phase: Phase) -> None:
        """Books a build phase as a plan: it has come to no store."""
        if not phase.epochs:
            self.ledger.rename(phase, "plan")
