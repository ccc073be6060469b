"""The model as a chain of blocks: finding the blocks, freezing them, running them alone, and bypassing them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..rng import preserve_rng
from .families import FAMILIES, block_groups
from .layout import FeatureLayout
from .tracing import (
    Block,
    Captured,
    ChainError,
    Trace,
    accept_feature,
    eval_mode,
    first_tensor,
    main_input_name,
    override_forward,
    placeholders,
    run_trace,
    synthetic_probe,
    take_rows,
)


class BlockChain:
    """A model seen as stem -> block 1 .. block L -> head.

    `cut` counts the frozen blocks from the input, stem included: 0 is nothing, `len(chain)` everything but the head.
    The feature at a cut is the tensor that enters block `cut` (that leaves the last block, if `cut == len(chain)`).

    The chain never changes the model's structure. In `replay`, the `forward` of the prefix's module *instances* is
    overridden: they return placeholders of the right shape without computing, and block `cut` gets the feature. Code
    of the model that runs between the blocks sees what it expects, and `state_dict`, pickling and evaluation outside
    `replay` are those of the untouched model.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block]):
        self.model = model
        self.blocks = tuple(blocks)
        self.cut = 0
        self._trace: Trace | None = None
        self._proved: set[int] = set()
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
            probe: a batch of model inputs (two rows are used). If None, random pixels of the configured size are; if
                the configuration does not tell the size, the proof is made with the first inputs that `prefix` gets.

        Raises:
            ChainError: if the blocks are unknown, a module does not exist, or a cut fails the proof; the message
                names the module and the reason.
        """
        chain = cls(model, _named_blocks(model, blocks) if blocks is not None else _declared_blocks(model))
        if probe is None:
            probe = synthetic_probe(model)
        if probe is not None:
            chain.trace(probe)
            for cut in range(1, len(chain) + 1):
                chain.prove(probe, cut)
        return chain

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def names(self) -> list[str]:
        """Module names of the blocks, stem first."""
        return [block.name for block in self.blocks]

    @property
    def main_input(self) -> str:
        """Name of the model's main input, `pixel_values` for vision models."""
        return main_input_name(self.model)

    # Knowing the model

    def trace(self, inputs: Mapping[str, Any]) -> None:
        """Runs the model once (two rows, eval mode) and records what crosses every block.

        Raises:
            ChainError: if a block does not run exactly once, or not in its order.
        """
        self._trace = run_trace(self.model, self.blocks, self._probe(inputs))
        self._proved.clear()
        if self.cut:
            self.freeze(self.cut)  # parameters outside the blocks are known only now

    @contextlib.contextmanager
    def traced(self, record: Mapping[str, Any] | Trace) -> Iterator[Trace]:
        """Inside, the chain knows the model from another run, of inputs of another size; yields that run's record.

        Args:
            record: model inputs to trace the model with, or what this has yielded for some.

        Raises:
            ChainError: as `trace`.
        """
        kept = self._trace, self._proved
        self._proved = set()
        try:
            if isinstance(record, Trace):
                self._trace = record
            else:
                self.trace(record)
            yield self._trace
        finally:
            self._trace, self._proved = kept

    def prove(self, inputs: Mapping[str, Any], cut: int) -> None:
        """Checks on two rows of `inputs` that prefix and suffix reproduce the model's logits, bit for bit.

        Raises:
            ChainError: if they do not: something besides the output of the block before the cut crosses it. Also if
                training draws random numbers before the cut outside the modules that a freeze puts in eval mode.
        """
        self._check_cut(cut)
        if self._trace is None:
            self.trace(inputs)
        probe = self._probe(inputs)
        with preserve_rng(), torch.no_grad(), eval_mode(self.model):
            expected = _answer(self.model(**probe))
            features = self._capture(probe, cut)
            if not torch.equal(features, self._captured_in_training(probe, cut)):
                raise ChainError(
                    f"{self._cannot_cut(cut)} in training the feature is random or depends on the batch, though every "
                    "block before the cut is in eval mode: a dropout or normalization outside the blocks, or shared "
                    "with later ones."
                )
            try:
                with self.replay(cut):
                    replayed = _answer(self.model(**{**probe, self.main_input: features}))
            except Exception as error:
                raise ChainError(f"{self._cannot_cut(cut)} running the rest on the feature failed: {error}") from error
            if torch.equal(expected, replayed):
                self._proved.add(cut)
                return
            # An accelerator's kernels may differ from run to run: then, and only then, closeness has to do.
            reproducible = torch.equal(expected, _answer(self.model(**probe)))
        if reproducible or not torch.allclose(expected, replayed, rtol=1e-3, atol=1e-4):
            difference = (expected.double() - replayed.double()).abs().max().item()
            raise ChainError(
                f"{self._cannot_cut(cut)} the logits differ by up to {difference:.3g}: something besides the output "
                "of the block before the cut crosses it (a skip connection, an input-dependent side channel)."
            )
        self._proved.add(cut)

    def layout(self, cut: int) -> FeatureLayout:
        """Shape, grid, special tokens and dtype of the feature at `cut`.

        Raises:
            ChainError: if the model was not run yet and its configuration does not tell the size of its input.
        """
        self._check_cut(cut)
        if self._trace is None:
            probe = synthetic_probe(self.model)
            if probe is None:
                raise ChainError(
                    f"the input of {type(self.model).__name__} is unknown: pass `probe=` to `BlockChain.from_model`, "
                    "or call `prefix` once."
                )
            self.trace(probe)
        return self._trace.layout(cut)

    # Freezing

    def freeze(self, cut: int) -> list[nn.Parameter]:
        """Freezes the prefix: no gradient, no BatchNorm update, no dropout. Never thaws.

        Returns:
            The parameters that were trainable before, for the optimizer to forget.
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
        self.eval_prefix()
        return newly_frozen

    def unfreeze(self) -> None:
        """Gives every parameter the `requires_grad` it had before the first `freeze`."""
        for parameter, requires_grad in self._requires_grad.items():
            parameter.requires_grad_(requires_grad)
        self._requires_grad.clear()
        self.cut = 0

    def eval_prefix(self) -> None:
        """Puts the frozen modules in eval mode (again: `model.train()` undoes it)."""
        for module in self.prefix_modules(self.cut):
            module.training = False

    def prefix_modules(self, cut: int) -> list[nn.Module]:
        """All modules that run before `cut` only, submodules included."""
        roots = [module for block in self.blocks[:cut] for module in block.modules]
        if self._trace is not None:
            roots += self._trace.glue_before(cut)
        return list({id(module): module for root in roots for module in root.modules()}.values())

    def prefix_parameters(self, cut: int) -> dict[str, nn.Parameter]:
        """The parameters that belong to the prefix or on which the feature at `cut` depends, by name."""
        modules = [module for block in self.blocks[:cut] for module in block.modules]
        members = {id(p) for module in modules for p in module.parameters()}
        if self._trace is not None:
            members |= {id(parameter) for parameter in self._stray_parameters(cut)}
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
            The feature, `(B, T, C)` or `(B, C, H, W)`; the main input itself at cut 0.

        Raises:
            ChainError: if this cut has not been proved yet and the proof on these inputs fails.
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
            inputs: as for `prefix`, but with the feature at `from_cut` for the main input; it must come from inputs of
                the shape on which the model was traced.
            from_cut: blocks that have run.
            to_cut: blocks to have run afterwards.

        Returns:
            The feature at `to_cut`: what `prefix` gives there, bit for bit, if it gave the one at `from_cut`.

        Raises:
            ChainError: if a cut has not been proved yet and its proof on the traced inputs fails, or if the feature
                has another shape or dtype than the one at `from_cut`.
            ValueError: if `to_cut` lies before `from_cut`.
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
        if self._trace is None:
            self.layout(from_cut)
        expected, found = self._trace.features[from_cut], (tuple(feature.shape[1:]), feature.dtype)
        if expected != found:
            raise ChainError(
                f"{type(self.model).__name__} was traced on inputs whose feature at cut {from_cut} is {expected[0]} "
                f"({expected[1]}), not {found[0]} ({found[1]}): trace it on inputs of the size and precision that the "
                "feature was made from."
            )
        for cut in (from_cut, to_cut):
            if cut not in self._proved:
                self.prove(self._trace.probe, cut)
        with torch.no_grad(), eval_mode(self.model), self.replay(from_cut):
            return self._capture(inputs, to_cut)

    @contextlib.contextmanager
    def replay(self, cut: int) -> Iterator[None]:
        """Inside, the model takes the feature at `cut` in place of its main input and runs the suffix only.

        Wrap the backward pass too: activation checkpointing runs the suffix again there.

        Raises:
            ChainError: if the model was never run, so that the shapes of the prefix are unknown.
            RuntimeError: if a replay is already going on.
        """
        self._check_cut(cut)
        if self._replaying:
            raise RuntimeError("a replay is already going on; leave it before the next one.")
        if cut == 0:
            yield
            return
        if self._trace is None:
            self.layout(cut)
        trace, feed = self._trace, {}

        def take_feature(original):
            def forward(*args, **kwargs):
                args, kwargs, feed["feature"] = trace.swap_main_input(args, kwargs)
                return original(*args, **kwargs)

            return forward

        def skip(module):
            def forward(*args, **kwargs):
                return placeholders(trace.outputs[module], len(feed["feature"]))

            return lambda original: forward

        def leave(module):
            def forward(*args, **kwargs):
                output = placeholders(trace.outputs[module], len(feed["feature"]))
                return accept_feature(output, feed["feature"])

            return lambda original: forward

        def enter(original):
            def forward(*args, **kwargs):
                args, kwargs = trace.inject(cut, args, kwargs, feed["feature"])
                return original(*args, **kwargs)

            return forward

        modules = [module for block in self.blocks[:cut] for module in block.modules]
        self._replaying = True
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(override_forward(self.model, take_feature))
                last = modules.pop() if cut == len(self) else None
                for module in modules:
                    stack.enter_context(override_forward(module, skip(module)))
                if last is not None:
                    stack.enter_context(override_forward(last, leave(last)))
                else:
                    stack.enter_context(override_forward(self.blocks[cut].modules[0], enter))
                yield
        finally:
            self._replaying = False
            feed.clear()

    # Helpers

    def _capture(self, inputs: Mapping[str, Any], cut: int) -> torch.Tensor:
        if cut < len(self):

            def stop(module, args, kwargs):
                raise Captured(self._trace.injected(cut, args, kwargs))

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
        """The feature as training on a frozen prefix computes it; buffers and modes are put back."""
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

    def _stray_parameters(self, cut: int) -> list[nn.Parameter]:
        """Parameters outside every block (a position embedding on the model itself) on which the feature depends."""
        trace = self._trace
        if cut not in trace.stray_by_cut:
            candidates = [p for p in trace.stray_parameters if p.is_floating_point()]
            used = []
            if candidates and cut:
                flags = [p.requires_grad for p in candidates]
                try:
                    for parameter in candidates:
                        parameter.requires_grad_(True)
                    with preserve_rng(), torch.enable_grad(), eval_mode(self.model):
                        feature = self._capture(trace.probe, cut)
                        if feature.requires_grad:
                            gradients = torch.autograd.grad(feature.float().sum(), candidates, allow_unused=True)
                            used = [p for p, g in zip(candidates, gradients, strict=True) if g is not None]
                finally:
                    for parameter, flag in zip(candidates, flags, strict=True):
                        parameter.requires_grad_(flag)
            trace.stray_by_cut[cut] = used
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


def _answer(output: Any) -> torch.Tensor:
    if isinstance(output, Mapping) and "logits" in output:
        return first_tensor(output["logits"])
    return first_tensor(output)


def _named_blocks(model: nn.Module, names: Sequence[str]) -> list[Block]:
    modules = dict(model.named_modules())
    if isinstance(names, str) or not names:
        raise ChainError("`blocks` is a list of module names, the stem first; it must not be empty.")
    for name in names:
        if name not in modules:
            raise ChainError(
                f"{type(model).__name__} has no module '{name}'; see `model.named_modules()` for the names."
            )
    if len(set(names)) != len(names):
        raise ChainError("`blocks` names a module twice.")
    for name in names:
        inside = [other for other in names if other.startswith(name + ".")]
        if inside:
            raise ChainError(f"blocks must not contain each other: '{inside[0]}' is inside '{name}'.")
    return [Block(name, (modules[name],)) for name in names]


def _declared_blocks(model: nn.Module) -> list[Block]:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    family = FAMILIES.get(model_type)
    if family is None:
        raise ChainError(
            f"the blocks of {type(model).__name__} (model type {model_type!r}) are not declared; known are "
            f"{', '.join(sorted(FAMILIES))}. Name the blocks yourself, stem first: blocks=['stem', 'layer1.0', ...]."
        )
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else None
    base = model if base is None else base
    groups = block_groups(base, family)
    if groups is None:
        raise ChainError(
            f"{type(model).__name__} does not look like a '{model_type}': no module '{family.stem}' or no blocks "
            f"'{family.blocks[0]}' in its {type(base).__name__}. Name the blocks yourself with blocks=[...]."
        )
    names = {module: name for name, module in model.named_modules()}
    return [
        Block(names[base.get_submodule(name)], tuple(base.get_submodule(path) for path in paths))
        for name, paths in groups
    ]
