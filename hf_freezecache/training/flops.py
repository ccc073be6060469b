"""FLOPs of a model in every way to run it, counted once each, and of what a training runs."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ..model.chain import BlockChain
from ..model.inputs import main_input_name
from ..model.modes import eval_mode
from ..model.structure import first_tensor
from ..model.tokens import take_columns, token_mask
from ..rng import preserve_rng

if TYPE_CHECKING:
    from .accounting import Phase


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
        samples: samples of the training steps so far, of this process; a text in a batch narrower than the probe is a
            part of one.
        forward_passes: of a training step that has no backward pass; None: it is one of each.
    """

    def __init__(self, chain: BlockChain, probe: Mapping[str, Any]):
        self.chain, self.probe = chain, probe
        self.forward_passes: int | None = None
        self.samples = 0.0
        self._per_sample: dict[tuple[int, str], float] = {}
        is_text = token_mask(probe, chain.main_input) is not None
        self._width = probe[chain.main_input].shape[-1] if is_text else None
        self._by_width: np.ndarray | None = None
        self._seen: list[float] = []
        self._runs: defaultdict[tuple[int, int], float] = defaultdict(float)
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

    def measure_ahead(self) -> None:
        """Measures steps and evaluations at every cut, and widths: a model in shards cannot be measured in a step.

        A backward pass outside the training's own would leave gradients for the next step, and a forward pass waits
        for all processes.
        """
        if self._width is not None:
            self._by_width = self._measure_by_width(self._width)
        for cut in range(len(self.chain) + 1):
            trained = [each for each in self.chain.prefix_parameters(cut).values() if each.requires_grad]
            try:
                for parameter in trained:
                    parameter.requires_grad_(False)
                self.per_sample("live", cut)
            finally:
                for parameter in trained:
                    parameter.requires_grad_(True)
            self.per_sample("eval", cut)

    def share_of_prefix(self, cut: int, live_cut: int) -> float:
        """FLOPs of a step's forward passes up to a cut, relative to those of a step at an earlier cut, 1 at most.

        Args:
            cut: frozen blocks.
            live_cut: at which live steps have run.
        """
        live = self._per_sample.get((live_cut, "live"))
        return min(1.0, (self.forward_passes or 1) * self.per_sample("build", cut) / live) if live else 1.0

    def relative(self, width: int | None) -> float:
        """FLOPs of a text in a batch of some width, padding included, relative to those of a text of the probe.

        Some operations take as many whatever the width, most grow with it, those of attention with its square: runs of
        three widths tell how many of each there are.

        Args:
            width: positions; None: the samples are no texts.

        Returns:
            The ratio; 1 where the samples are no texts.
        """
        if self._width is None or width is None or width == self._width:
            return 1.0
        if self._by_width is None:
            with preserve_rng():
                self._by_width = self._measure_by_width(self._width)
        return max(0.0, float(np.polyval(self._by_width, width / self._width)))

    def width_of(self, inputs: Any) -> int | None:
        """Positions of the texts of a batch, of any type; None where the samples are no texts, or it does not say."""
        if self._width is None or not isinstance(inputs, Mapping):
            return None
        main = inputs.get(self.chain.main_input)
        return main.shape[-1] if isinstance(main, torch.Tensor) else None

    def see(self, inputs: Any) -> None:
        """Takes note of the width of a batch, for `mean_seen`."""
        self._seen.append(self.relative(self.width_of(inputs)))

    def mean_seen(self) -> float:
        """The mean of `relative` over the batches since the last call; 1 if there were none."""
        seen, self._seen = self._seen, []
        return sum(seen) / len(seen) if seen else 1.0

    def step(self, mode: str, samples: float) -> float:
        """FLOPs of a training step's micro-batch, whose samples are counted."""
        self.samples += samples
        return self.per_sample(mode) * samples

    def plain_per_step(self, steps: int) -> float | None:
        """FLOPs of an average optimizer step at cut 0; None if nothing was trained or cut 0 was never measured."""
        plain = self._per_sample.get((0, "live"))
        return None if plain is None or not steps else plain * self.samples / steps

    def count_run(self, from_cut: int, to_cut: int, samples: int, width: int | None = None) -> None:
        """Counts samples on which a build has run the blocks between two cuts; texts with their width."""
        self._runs[from_cut, to_cut] += samples * self.relative(width)

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

    def _measure_by_width(self, width: int) -> np.ndarray:
        """A polynomial of the width, relative to the probe's, for FLOPs relative to those of the probe."""
        mask = token_mask(self.probe, self.chain.main_input)
        assert mask is not None  # the samples are texts
        flops = {}
        for narrower in sorted({width, width // 2, width // 4} - {0}):
            inputs = take_columns(self.probe, mask.shape[1:], slice(narrower))
            flops[narrower / width] = measure_forward_flops(self.chain.model, inputs)
        counts = np.array(list(flops.values())) / max(1, flops[1.0])
        return np.polyfit(list(flops), counts, len(flops) - 1)

    def _measure(self, mode: str, cut: int) -> float:
        model = self.chain.model
        if mode == "live":
            return self._measure_step(self.probe)
        if mode == "eval":
            return measure_forward_flops(model, self.probe)
        if mode == "build":
            features = self.chain.prefix(self.probe, cut)  # traced and proved, which must not count
            with eval_mode(model), torch.no_grad(), counting_flops() as counter:
                self.chain.capture(self.probe, cut)
            return counter.get_total_flops() / len(features)
        features = self.chain.prefix(self.probe, cut)
        main_input = self.chain.input_of_replay(features, self.probe)
        with self.chain.replay(cut, features, main_input):
            inputs = {**self.probe, self.chain.main_input: main_input}
            return measure_forward_flops(model, inputs) if mode == "eval_replay" else self._measure_step(inputs)

    def _measure_step(self, inputs: Mapping[str, Any]) -> float:
        if self.forward_passes is None:
            return measure_training_flops(self.chain.model, inputs)
        return self.forward_passes * measure_forward_flops(self.chain.model, inputs)
