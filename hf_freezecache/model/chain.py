"""The model as a chain of blocks: finding, freezing and running the blocks, and replaying the rest without them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .blocks import Block, declared_blocks, named_blocks
from .bypass import Bypass
from .capture import capture, capture_in_training, frozen_modes, is_moving
from .errors import ChainError
from .inputs import main_input_name
from .layout import FeatureLayout
from .modes import eval_mode
from .padding import Padding
from .probes import check_inputs, first_rows, synthetic_probe
from .proving import prove
from .resizing import resize
from .stand_ins import stays_real
from .trace import Trace


class BlockChain:
    """A model seen as stem -> block 1 .. block L -> head.

    A cut is a number of frozen blocks, counted from the input, stem included: 0 freezes nothing, `len(chain)`
    everything but the head. The feature at a cut is the tensor that enters block `cut` or, at `len(chain)`, the tensor
    that leaves the last block.

    The chain never changes the model's structure. `replay` overrides `forward` on the prefix's module *instances*:
    they return stand-ins of the recorded shapes without computing, and block `cut` receives the feature. Code of
    the model that runs between the blocks gets outputs of the structure it expects. Outside `replay`, `state_dict`,
    pickling and evaluation are those of the original model.

    Args:
        model: the model; it stays the caller's.
        blocks: its blocks, in the order in which they run. `from_model` finds and checks them.

    Attributes:
        cut: number of blocks that `freeze` has frozen.
        padding: of texts, whether it is part of their features.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block]):
        self.model = model
        self.blocks = tuple(blocks)
        self.cut = 0
        self._trace: Trace | None = None
        self._proved: set[int] = set()
        self._frozen_modules: list[nn.Module] | None = None  # those of the cut; None: to be found
        self._replaying = False
        self._requires_grad: dict[str, bool] = {}  # by name: FSDP puts others in place of the parameters
        self.padding = Padding(self)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        blocks: Sequence[str] | None = None,
        probe: Mapping[str, Any] | None = None,
    ) -> BlockChain:
        """Finds the blocks of a model in a recorded run on a probe batch, and what crosses between them.

        Each cut is proved before its first use; see `prove`.

        Args:
            model: any model.
            blocks: module names, in the order in which they run; the first is the stem. If None, they are those of
                the model's family where it is declared; else they are found in the run.
            probe: a batch of model inputs, of which two rows are used. If None, the probe is random pixels of the
                size in the model's configuration; if it has no size and the blocks are known, the first inputs that
                `prefix` gets are recorded.

        Raises:
            ChainError: if a module does not exist, the model cannot be cut at a block that was named, or nowhere; the
                message names the module and what crosses.
        """
        known = named_blocks(model, blocks) if blocks is not None else declared_blocks(model)
        if probe is None:
            probe = synthetic_probe(model)
        if known is None:
            if probe is None:
                raise ChainError(
                    f"the blocks of {type(model).__name__} are found in a run of it: pass `probe=`, a small batch of "
                    "its inputs, or name them: blocks=['stem', 'layer1.0', ...]."
                )
            trace = Trace(model, None, first_rows(model, probe))
            chain = cls(model, trace.blocks)
            chain._trace = trace
            return chain
        chain = cls(model, known)
        if probe is not None:
            trace = chain.trace(probe)
            for cut in range(1, len(chain) + 1):
                trace.cut(cut)
        return chain

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def names(self) -> list[str]:
        """Module names of the blocks, stem first."""
        return [block.name for block in self.blocks]

    @property
    def main_input(self) -> str:
        """Name of the input that the feature replaces: `pixel_values` for vision models."""
        return main_input_name(self.model)

    # Tracing and proving

    def trace(self, inputs: Mapping[str, Any]) -> Trace:
        """Runs the model once (two rows, eval mode) and records what crosses every block.

        Returns:
            The record, which the chain uses from now on.

        Raises:
            ChainError: if a block does not run exactly once, or the blocks run in another order.
        """
        self._trace = trace = Trace(self.model, self.blocks, first_rows(self.model, inputs))
        self._frozen_modules = None
        self._proved.clear()
        if self.cut:
            self.freeze(self.cut)  # only a trace tells which parameters outside the blocks belong to the prefix
        return trace

    @contextlib.contextmanager
    def traced(self, record: Mapping[str, Any] | Trace) -> Iterator[Trace]:
        """Inside the context, the chain uses the trace of inputs of another size; outside, its own.

        Args:
            record: model inputs to trace the model with, or a trace that this method yielded before.

        Yields:
            The trace.

        Raises:
            ChainError: as `trace`.
        """
        own = self._trace, self._proved
        self._proved = set()
        try:
            if isinstance(record, Trace):
                self._trace = trace = record
            else:
                trace = self.trace(record)
            yield trace
        finally:
            self._trace, self._proved = own

    def prove(self, inputs: Mapping[str, Any], cut: int) -> None:
        """Checks on rows of `inputs` that prefix and suffix reproduce the model's loss and logits, bit for bit.

        Raises:
            ChainError: if they do not: then something besides the feature crosses the cut. Also if the feature of a
                sample depends on the samples beside it, or in training on random numbers.
        """
        self._check_cut(cut)
        check_inputs(self.model, inputs)
        self.trace_if_new(inputs, cut)
        prove(self, inputs, cut)
        self._proved.add(cut)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the main input of one sample, as it was traced: of any number of dimensions."""
        return tuple(self.own_trace().probe[self.main_input].shape[1:])

    def layout(self, cut: int) -> FeatureLayout:
        """Shape, grid, special tokens and dtype of the feature at `cut`; of texts as wide as those of the trace.

        Raises:
            ChainError: if the model was not run yet and its configuration does not name the size of its input.
        """
        self._check_cut(cut)
        return self.own_trace().layout(cut)

    def stored_layout(self, cut: int) -> FeatureLayout:
        """The layout in which stores hold the feature at `cut`: that of a token, where samples have several sizes.

        Raises:
            ChainError: as `layout`.
        """
        if self.padding.trimmed(cut) is not None:
            return replace(self.padding.widest_trace(cut).layout(cut), is_trimmed=True)
        layout = self.layout(cut)
        if not self.padding.ignored(cut) and not self.padding.has_sizes(cut):
            return layout
        return FeatureLayout((layout.channels,), None, 0, layout.dtype, is_token=True)

    def share(self, cut: int) -> float:
        """FLOPs that a replay at `cut` leaves out, relative to a forward pass of the model."""
        self._check_cut(cut)
        return self.own_trace().cut(cut).boundary.flops if cut else 0.0

    def crossing(self, cut: int) -> int:
        """Number of tensors that cross a cut; the feature holds them side by side."""
        self._check_cut(cut)
        return len(self.own_trace().cut(cut).parts) if cut else 1

    def inputs_of(self, cut: int) -> frozenset[str]:
        """Names of the recorded inputs on which the feature at a cut depends."""
        self._check_cut(cut)
        return self.own_trace().cut(cut).boundary.inputs if cut else frozenset({self.main_input})

    # Freezing

    def freeze(self, cut: int) -> list[nn.Parameter]:
        """Freezes the prefix: its parameters get no gradient, its BatchNorm and dropout run in eval mode.

        A smaller cut than the present one thaws nothing.

        Returns:
            The parameters that were trainable before: the optimizer must drop their state.
        """
        self._check_cut(cut)
        newly_frozen = []
        for name, parameter in self.prefix_parameters(cut).items():
            self._requires_grad.setdefault(name, parameter.requires_grad)
            if parameter.requires_grad:
                newly_frozen.append(parameter)
            parameter.requires_grad_(False)
            parameter.grad = None
        self.cut = max(self.cut, cut)
        self._frozen_modules = None
        self.eval_prefix()
        return newly_frozen

    def unfreeze(self) -> None:
        """Restores the `requires_grad` that every parameter had before the first `freeze`; the cut becomes 0."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._requires_grad.get(name, parameter.requires_grad))
        self._requires_grad.clear()
        self.cut, self._frozen_modules = 0, None

    def eval_prefix(self) -> None:
        """Puts the frozen modules in eval mode. To be called again after every `model.train()`, which undoes it."""
        if self._frozen_modules is None:
            self._frozen_modules = self.prefix_modules(self.cut)
        for module in self._frozen_modules:
            object.__setattr__(module, "training", False)  # at every step, for all modules: the quick way

    def prefix_modules(self, cut: int) -> list[nn.Module]:
        """All modules that run before the cut and not after it, submodules included."""
        if self._trace is not None and cut:
            return self._trace.flow.closed_modules(self._trace.cut(cut).boundary.clock)
        roots = [module for block in self.blocks[:cut] for module in block.modules]
        return list({id(module): module for root in roots for module in root.modules()}.values())

    def prefix_parameters(self, cut: int) -> dict[str, nn.Parameter]:
        """The parameters of the prefix's blocks, and others on which the feature at `cut` depends, by name."""
        if self._trace is not None and cut:
            frozen = self._trace.cut(cut).boundary.frozen
            return {name: p for name, p in self.model.named_parameters() if name in frozen}
        members = {id(p) for block in self.blocks[:cut] for module in block.modules for p in module.parameters()}
        return {name: p for name, p in self.model.named_parameters() if id(p) in members}

    def shared_parameters(self, cut: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the trainable parameters that freezing at `cut` freezes, and that are read behind the cut as well.

        Returns:
            Those that bar the cut, and those of embedding tables, which do not.
        """
        boundary = self.own_trace().cut(cut).boundary
        before = self._requires_grad
        trainable = {name for name, p in self.model.named_parameters() if before.get(name, p.requires_grad)}
        both = (boundary.shared, boundary.tied)
        return tuple(tuple(name for name in names if name in trainable) for names in both)  # type: ignore[return-value]

    @contextlib.contextmanager
    def frozen_modes(self) -> Iterator[None]:
        """Inside, what runs before the present cut runs in eval mode, modules that run on behind it included.

        `eval_prefix` cannot reach these: dropout in the model's own `forward`, or of a module that blocks share.
        """
        if not self.cut or self._trace is None or not self.needs_modes(self.cut):
            yield
            return
        skipped = self._trace.cut(self.cut).boundary.skipped if self._replaying else ()
        with frozen_modes(self.model, self._trace, self.cut, skipped):
            yield

    def prefix_buffers(self, cut: int) -> dict[str, torch.Tensor]:
        """The buffers of the prefix (BatchNorm statistics, position indices), by name."""
        members = {id(b) for module in self.prefix_modules(cut) for b in module.buffers(recurse=False)}
        return {name: buffer for name, buffer in self.model.named_buffers() if id(buffer) in members}

    def prefix_state(self, cut: int) -> dict[str, torch.Tensor]:
        """The parameters and the buffers of the prefix by name: every tensor on which the feature at `cut` depends."""
        return {**self.prefix_parameters(cut), **self.prefix_buffers(cut)}

    # Running the two parts

    def prefix(self, inputs: Mapping[str, Any], cut: int) -> torch.Tensor:
        """Runs the model up to `cut`, in eval mode and without gradients.

        Args:
            inputs: model inputs by name, e.g. `{"pixel_values": (B, 3, H, W)}`.
            cut: number of blocks to run.

        Returns:
            The feature, `(B, T, C)` or `(B, C, H, W)`; at cut 0 the main input itself. Of texts, padding included.

        Raises:
            ChainError: if this cut has not been proved yet and the proof on the recorded inputs fails.

        Shapes: B samples, T tokens, C channels, H height, W width.
        """
        self._check_cut(cut)
        if cut == 0:
            return inputs[self.main_input]
        self.trace_if_new(inputs, cut)
        if cut not in self._proved:
            self.prove(self.own_trace().probe, cut)
            self.trace_if_new(inputs, cut)
        if self.padding.is_any_size(cut):
            resize(self.model, self.own_trace(), cut, inputs)
        with torch.no_grad(), eval_mode(self.model):
            return self.capture(inputs, cut)

    def advance(self, inputs: Mapping[str, Any], from_cut: int, to_cut: int) -> torch.Tensor:
        """Runs the blocks between two cuts alone, in eval mode and without gradients.

        Args:
            inputs: as for `prefix`, but with the feature at `from_cut` as the main input. The feature must come from
                inputs of the shape on which the model was traced.
            from_cut: number of blocks that ran to give this feature.
            to_cut: number of blocks that have run to give the result.

        Returns:
            The feature at `to_cut`. If `prefix` computed the feature at `from_cut`, the result equals that of `prefix`
            at `to_cut`, bit for bit.

        Raises:
            ChainError: if a cut has not been proved yet and its proof on the traced inputs fails, or if the feature
                has another shape or dtype than the one at `from_cut`.
            ValueError: if `to_cut` is smaller than `from_cut`.
        """
        self._check_cut(from_cut)
        self._check_cut(to_cut)
        if to_cut < from_cut:
            raise ValueError(f"a feature at cut {from_cut} cannot go back to cut {to_cut}.")
        if from_cut == 0:
            return self.prefix(inputs, to_cut)
        feature = inputs[self.main_input]
        if from_cut == to_cut:
            return feature
        trace = self.own_trace()
        layout = trace.layout(from_cut)
        traced, given = (layout.shape, layout.dtype), (tuple(feature.shape[1:]), feature.dtype)
        if traced != given:
            raise ChainError(
                f"{type(self.model).__name__} was traced on inputs whose feature at cut {from_cut} is {traced[0]} "
                f"({traced[1]}), not {given[0]} ({given[1]}): trace it on inputs of the size and precision from which "
                "the feature was computed."
            )
        for cut in (from_cut, to_cut):
            if cut not in self._proved:
                self.prove(trace.probe, cut)
        with torch.no_grad(), eval_mode(self.model), self.replay(from_cut):
            return self.capture(inputs, to_cut, since=from_cut)

    def suffix(self, features: torch.Tensor, inputs: Mapping[str, Any], cut: int) -> Any:
        """Runs the model from `cut` on, with the features in the prefix's place.

        Args:
            features: the feature at `cut`, as `prefix` returned it.
            inputs: model inputs by name, labels included; a main input of floating-point numbers is not needed.
            cut: number of blocks that are not run.

        Returns:
            The model's output. What a bypassed block answers in it (hidden states, attentions) raises an error when it
            is read.

        Raises:
            ChainError: as `replay`.
        """
        if cut == 0:
            return self.model(**{**inputs, self.main_input: features})
        main_input = self.input_of_replay(features, inputs)
        with self.replay(cut, features, main_input):
            return self.model(**{**inputs, self.main_input: main_input})

    def input_of_replay(self, features: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The main input of a batch whose features are known: tokens as they are, a stand-in for anything else.

        Args:
            features: the feature at the cut.
            inputs: the batch; its main input may be missing unless it holds integers.
        """
        main = inputs.get(self.main_input)
        if isinstance(main, torch.Tensor) and stays_real(main):
            return main
        size = None if main is None else tuple(main.shape[1:])
        return self.own_trace().main_stand_in(len(features), features.device, size)

    @contextlib.contextmanager
    def replay(
        self, cut: int, features: torch.Tensor | None = None, main_input: torch.Tensor | None = None
    ) -> Iterator[None]:
        """Inside the context, the model runs the suffix only, on the feature at `cut`.

        The backward pass belongs inside the context too: activation checkpointing runs the suffix again in it.

        Args:
            cut: number of blocks that are not run.
            features: the feature; None: whatever the model is called on as its main input is the feature.
            main_input: where features are given, what `input_of_replay` returned. Calls of the model on anything else
                raise `FrozenOutputError`.

        Raises:
            ChainError: if the model was never run and its configuration does not name the size of its input: then the
                shapes of the prefix's outputs are unknown.
            RuntimeError: if another replay is active.
        """
        self._check_cut(cut)
        if self._replaying:
            raise RuntimeError("a replay is already active: leave it before you start the next one.")
        if cut == 0:
            yield
            return
        if self.cut and self.model.training and self._trace is not None:
            self.needs_modes(self.cut)  # not to be found out while the model is bypassed
        self._replaying = True
        try:
            trace = self.own_trace()
            resized = None if main_input is None else trace.resized.get((cut, tuple(main_input.shape[1:])))
            with Bypass(trace, trace.cut(cut), features, main_input, resized).active(self.model):
                yield
        finally:
            self._replaying = False

    # Helpers

    def trace_if_new(self, inputs: Mapping[str, Any], cut: int) -> None:
        """Traces the model unless it was traced on inputs of this size, or its features have none."""
        padding, trace = self.padding, self._trace
        if trace is None or not trace.fits(inputs, bool(padding.ignored(cut)), padding.is_any_size(cut)):
            self.trace(inputs)

    def own_trace(self) -> Trace:
        """The trace; if the model was not run yet, that of random inputs of the size in its configuration.

        Raises:
            ChainError: if the model was not run yet and its configuration does not name the size of its input.
        """
        if self._trace is not None:
            return self._trace
        probe = synthetic_probe(self.model)
        if probe is None:
            raise ChainError(
                f"the input of {type(self.model).__name__} is unknown: pass `probe=` to `BlockChain.from_model`, "
                "or call `prefix` once."
            )
        return self.trace(probe)

    def capture(self, inputs: Mapping[str, Any], cut: int, since: int = 0) -> torch.Tensor:
        """Runs the model as it is until the feature at a cut is known, and returns it.

        Args:
            inputs: as for `prefix`.
            cut: from 1 on.
            since: cut up to which a replay bypasses the model meanwhile.
        """
        trace = self.own_trace()
        return capture(self.model, trace, cut, inputs, trace.cut(since).boundary.skipped if since else ())

    def needs_modes(self, cut: int) -> bool:
        """Whether the feature at a cut is only fixed where modules that run on behind it are in eval mode before it.

        So it is if what they do before the cut draws random numbers, or depends on the batch, when they train. A model
        that cannot train on the recorded inputs alone (without labels) is left as it is; its cuts are never proved.
        """
        trace = self.own_trace()
        if cut not in trace.moving:
            trace.moving[cut] = is_moving(self.model, trace, cut)
        return trace.moving[cut]

    def captured_in_training(self, inputs: Mapping[str, Any], cut: int) -> torch.Tensor:
        """The feature as a training with a frozen prefix computes it; puts back what modules hold."""
        return capture_in_training(self.model, self.own_trace(), cut, inputs, self.needs_modes(cut))

    def cannot_cut(self, cut: int) -> str:
        """The beginning of a sentence that says why the model cannot be cut there."""
        return self.own_trace().cannot_cut(cut)

    def _check_cut(self, cut: int) -> None:
        if isinstance(cut, bool) or not isinstance(cut, int) or not 0 <= cut <= len(self):
            raise ValueError(
                f"cut {cut!r} is not possible: {type(self.model).__name__} has {len(self)} blocks (stem included), "
                f"so a cut is an integer from 0 to {len(self)}."
            )
