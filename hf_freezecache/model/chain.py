"""The model as a chain of blocks: finding, freezing and running the blocks, and replaying the rest without them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..rng import preserve_rng
from .blocks import declared_blocks, named_blocks
from .bypass import Bypass
from .errors import ChainError
from .layout import FeatureLayout
from .modes import eval_mode, override_forward
from .stand_ins import StandIn, stays_real
from .structure import first_tensor
from .tracing import Block, Captured, Trace, main_input_name, run_trace, synthetic_probe, take_rows


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
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block]):
        self.model = model
        self.blocks = tuple(blocks)
        self.cut = 0
        self._trace: Trace | None = None
        self._proved: set[int] = set()
        # Those of the cut; None: to be found.
        self._frozen_modules: list[nn.Module] | None = None
        self._replaying = False
        self._requires_grad: dict[nn.Parameter, bool] = {}

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        blocks: Sequence[str] | None = None,
        probe: Mapping[str, Any] | None = None,
    ) -> BlockChain:
        """Finds the blocks of a model and proves on a probe batch that it can be cut at each of them.

        Args:
            model: a Transformers model of a declared family, or any module if `blocks` is given.
            blocks: module names, in the order in which they run; the first is the stem.
            probe: a batch of model inputs, of which two rows are used. If None, the probe is random pixels of the
                size in the model's configuration; if the configuration has no size, the first inputs that `prefix`
                gets are used for the proof.

        Raises:
            ChainError: if the model's family is not declared, a module does not exist, or a cut fails the proof; the
                message names the module and the reason.
        """
        chain = cls(model, named_blocks(model, blocks) if blocks is not None else declared_blocks(model))
        if probe is None:
            probe = synthetic_probe(model)
        if probe is not None:
            chain.trace(probe)
            whole = None
            for cut in range(1, len(chain) + 1):
                whole = chain.prove(probe, cut, whole)
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
        self._trace = trace = run_trace(self.model, self.blocks, self._probe(inputs))
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
        own_trace, own_proofs = self._trace, self._proved
        self._proved = set()
        try:
            if isinstance(record, Trace):
                self._trace = trace = record
            else:
                trace = self.trace(record)
            yield trace
        finally:
            self._trace, self._proved = own_trace, own_proofs

    def prove(self, inputs: Mapping[str, Any], cut: int, whole: torch.Tensor | None = None) -> torch.Tensor:
        """Checks on two rows of `inputs` that prefix and suffix reproduce the model's logits, bit for bit.

        Returns the logits; the proof of another cut on the same inputs takes them as `whole`.

        Raises:
            ChainError: if they do not: then something besides the output of the block before the cut crosses the cut.
                Also if in training the feature depends on random numbers or on the batch, because a module that
                `freeze` does not put in eval mode runs before the cut.
        """
        self._check_cut(cut)
        if self._trace is None:
            self.trace(inputs)
        probe = self._probe(inputs)
        with preserve_rng(), torch.no_grad(), eval_mode(self.model):
            expected = _logits(self.model(**probe)) if whole is None else whole
            features = self._capture(probe, cut)
            if features.isnan().any() or expected.isnan().any():
                raise ChainError(
                    f"{self._cannot_cut(cut)} features or logits are NaN, which proves nothing: the weights have "
                    "diverged (lower the learning rate?), or the samples are NaN."
                )
            if not torch.equal(features, self._captured_in_training(probe, cut)):
                raise ChainError(
                    f"{self._cannot_cut(cut)} in training the feature is random or depends on the batch, though every "
                    "block before the cut is in eval mode: a dropout or normalization outside the blocks, or shared "
                    "with later ones."
                )
            try:
                replayed = _logits(self.suffix(features, probe, cut))
            except Exception as error:  # the model's own code may raise anything
                raise ChainError(
                    f"{self._cannot_cut(cut)} running the rest on the feature failed with "
                    f"{type(error).__name__}: {error}"
                ) from error
            if isinstance(replayed, StandIn):
                raise ChainError(
                    f"{self._cannot_cut(cut)} the logits depend on {replayed.stands_for}, which crosses it beside the "
                    "feature (a skip connection, an input-dependent side channel)."
                )
            if torch.equal(expected, replayed):
                self._proved.add(cut)
                return expected
            # An accelerator's kernels may differ from run to run. Only then are close logits accepted.
            reproducible = torch.equal(expected, _logits(self.model(**probe)))
        if reproducible or not torch.allclose(expected, replayed, rtol=1e-3, atol=1e-4):
            difference = (expected.double() - replayed.double()).abs().max().item()
            raise ChainError(
                f"{self._cannot_cut(cut)} the logits differ by up to {difference:.3g}: something besides the output "
                "of the block before the cut crosses it (a skip connection, an input-dependent side channel)."
            )
        self._proved.add(cut)
        return expected

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the main input of one sample, as it was traced: of any number of dimensions."""
        return tuple(self._own_trace().probe[self.main_input].shape[1:])

    def layout(self, cut: int) -> FeatureLayout:
        """Shape, grid, special tokens and dtype of the feature at `cut`.

        Raises:
            ChainError: if the model was not run yet and its configuration does not name the size of its input.
        """
        self._check_cut(cut)
        return self._own_trace().layout(cut)

    # Freezing

    def freeze(self, cut: int) -> list[nn.Parameter]:
        """Freezes the prefix: its parameters get no gradient, its BatchNorm and dropout run in eval mode.

        A smaller cut than the present one thaws nothing.

        Returns:
            The parameters that were trainable before: the optimizer must drop their state.
        """
        self._check_cut(cut)
        newly_frozen = []
        for parameter in self.prefix_parameters(cut).values():
            self._requires_grad.setdefault(parameter, parameter.requires_grad)
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
        for parameter, requires_grad in self._requires_grad.items():
            parameter.requires_grad_(requires_grad)
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
        roots = [module for block in self.blocks[:cut] for module in block.modules]
        if self._trace is not None:
            roots += self._trace.glue_before(cut)
        return list({id(module): module for root in roots for module in root.modules()}.values())

    def prefix_parameters(self, cut: int) -> dict[str, nn.Parameter]:
        """The parameters of the prefix's blocks, and others on which the feature at `cut` depends, by name."""
        modules = [module for block in self.blocks[:cut] for module in block.modules]
        members = {id(p) for module in modules for p in module.parameters()}
        if self._trace is not None:
            members |= {id(parameter) for parameter in self._stray_parameters(self._trace, cut)}
        return {name: p for name, p in self.model.named_parameters() if id(p) in members}

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
            The feature, `(B, T, C)` or `(B, C, H, W)`; at cut 0 the main input itself.

        Raises:
            ChainError: if this cut has not been proved yet and the proof on these inputs fails.

        Shapes: B samples, T tokens, C channels, H height, W width.
        """
        self._check_cut(cut)
        if cut == 0:
            return inputs[self.main_input]
        if self._trace is None or not self._trace.fits(inputs):
            self.trace(inputs)
        if cut not in self._proved:
            self.prove(inputs, cut)
        with torch.no_grad(), eval_mode(self.model):
            return self._capture(inputs, cut)

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
        trace = self._own_trace()
        traced, given = trace.features[from_cut], (tuple(feature.shape[1:]), feature.dtype)
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
            return self._capture(inputs, to_cut)

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
        return self._own_trace().main_stand_in(len(features), features.device)

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
        self._replaying = True
        try:
            with contextlib.ExitStack() as stack:
                bypass = Bypass(self._own_trace(), self.blocks, cut, features, main_input)
                for module, wrap in bypass.overrides(self.model):
                    stack.enter_context(override_forward(module, wrap))
                yield
        finally:
            self._replaying = False

    # Helpers

    def _own_trace(self) -> Trace:
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

    def _capture(self, inputs: Mapping[str, Any], cut: int) -> torch.Tensor:
        if cut < len(self):
            trace = self._own_trace()

            def stop(module, args, kwargs):
                raise Captured(trace.injected(cut, args, kwargs))

            handle = self.blocks[cut].modules[0].register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
        else:

            def stop(module, args, output):
                raise Captured(first_tensor(output))

            handle = self.blocks[-1].modules[-1].register_forward_hook(stop)
        try:
            self.model(**inputs)
        except Captured as captured:
            return captured.feature
        finally:
            handle.remove()
        raise ChainError(f"{self._cannot_cut(cut)} the model returned without running it.")

    def _captured_in_training(self, inputs: Mapping[str, Any], cut: int) -> torch.Tensor:
        """The feature as a training with a frozen prefix computes it; restores buffers and modes."""
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        with eval_mode(self.model):
            self.model.train()
            for module in self.prefix_modules(cut):
                module.training = False
            try:
                return self._capture(inputs, cut)
            finally:
                for buffer, value in buffers:
                    buffer.copy_(value)

    def _stray_parameters(self, trace: Trace, cut: int) -> list[nn.Parameter]:
        """Parameters outside every block (a position embedding on the model itself) on which the feature depends."""
        if cut not in trace.stray_by_cut:
            candidates = [p for p in trace.stray_parameters if p.is_floating_point()]
            dependencies = []
            if candidates and cut:
                flags = [p.requires_grad for p in candidates]
                try:
                    for parameter in candidates:
                        parameter.requires_grad_(True)
                    with preserve_rng(), torch.enable_grad(), eval_mode(self.model):
                        feature = self._capture(trace.probe, cut)
                        if feature.requires_grad:
                            gradients = torch.autograd.grad(feature.float().sum(), candidates, allow_unused=True)
                            dependencies = [p for p, g in zip(candidates, gradients, strict=True) if g is not None]
                finally:
                    for parameter, flag in zip(candidates, flags, strict=True):
                        parameter.requires_grad_(flag)
            trace.stray_by_cut[cut] = dependencies
        return trace.stray_by_cut[cut]

    def _probe(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        if self.main_input not in inputs:
            raise ChainError(
                f"{type(self.model).__name__} reads '{self.main_input}', but the batch has only {sorted(inputs)}."
            )
        return take_rows(inputs, rows=2, batch_size=len(inputs[self.main_input]))

    def _check_cut(self, cut: int) -> None:
        if isinstance(cut, bool) or not isinstance(cut, int) or not 0 <= cut <= len(self):
            raise ValueError(
                f"cut {cut!r} is not possible: {type(self.model).__name__} has {len(self)} blocks (stem included), "
                f"so a cut is an integer from 0 to {len(self)}."
            )

    def _cannot_cut(self, cut: int) -> str:
        where = f"before '{self.names[cut]}'" if cut < len(self) else f"after '{self.names[-1]}'"
        return f"{type(self.model).__name__} cannot be cut {where} (cut {cut}):"


def _logits(output: Any) -> torch.Tensor:
    if isinstance(output, Mapping) and "logits" in output:
        return first_tensor(output["logits"])
    return first_tensor(output)
