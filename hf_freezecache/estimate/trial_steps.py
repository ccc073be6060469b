"""Training steps that are timed and leave nothing behind: no gradient, weight, statistic or random number changes."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from ..model.chain import BlockChain
from ..model.modes import untouched
from ..model.stand_ins import StandIn
from ..model.structure import first_tensor

T = TypeVar("T")

#: Steps before the ones that count: the first makes the optimizer's state and the allocator's buffers.
_WARMUP = 1


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """Runs something and waits for the accelerator; its result and its seconds."""
    _synchronize()
    start = time.perf_counter()
    result = call()
    _synchronize()
    return result, time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class TrialSteps:
    """Steps of a training at any cut.

    The optimizer works on copies of the weights, of which it gets the true gradients.

    Args:
        chain: the model.
        loss: `loss(model, inputs)`; the model's own, or a sum of its first output, if None.
        optimizer: makes one for the parameters that it gets; AdamW if None.
        max_grad_norm: gradients are clipped to it before the optimizer's step; 0: they are not.
        accumulation: batches of one optimizer step.
        forward_passes: losses of a batch in a step without a backward pass, whose optimizer gets no gradients; None: a
            step follows gradients.
    """

    def __init__(
        self,
        chain: BlockChain,
        loss: Callable[[nn.Module, Mapping[str, Any]], torch.Tensor] | None = None,
        optimizer: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer] | None = None,
        max_grad_norm: float = 0.0,
        accumulation: int = 1,
        forward_passes: int | None = None,
    ):
        self.chain, self.loss = chain, _own_loss if loss is None else loss
        self.optimizer = torch.optim.AdamW if optimizer is None else optimizer
        self.max_grad_norm, self.accumulation = max_grad_norm, accumulation
        self.forward_passes = forward_passes

    def measure(
        self, cut: int, batches: Sequence[Mapping[str, Any]], features: Sequence[torch.Tensor] | None = None
    ) -> tuple[float, int]:
        """Times one step a batch, after a step to warm up.

        Args:
            cut: frozen blocks.
            batches: model inputs and labels, on the model's device.
            features: of the batches at the cut; not needed at cut 0.

        Returns:
            Median seconds of a step, without loading and prefix; and the bytes that parameters, gradients, optimizer
            and activations take at its peak. Without a backward pass there are no gradients, and of activations none
            are kept: on a CPU they do not count.
        """
        model, frozen = self.chain.model, {id(p) for p in self.chain.prefix_parameters(cut).values()}
        with untouched(model):
            for parameter in model.parameters():
                if id(parameter) in frozen:
                    parameter.requires_grad_(False)
            model.train()
            for module in self.chain.prefix_modules(cut):
                module.training = False
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            with torch.set_grad_enabled(self.forward_passes is None):
                pairs = zip(batches, [None] * len(batches) if features is None else features, strict=True)
                return self._measure(cut, trained, list(pairs))

    def _measure(self, cut: int, trained: list[nn.Parameter], batches: list[tuple[Mapping[str, Any], Any]]):
        copies = [nn.Parameter(parameter.detach().clone()) for parameter in trained]
        optimizer = self.optimizer(copies) if copies else None
        saved: dict[int, int] = {}
        seconds = []
        for number, (batch, features) in enumerate([*batches[:_WARMUP], *batches]):
            with contextlib.ExitStack() as stack:
                if number == 0:
                    stack.enter_context(_counting_saved(saved))
                elif torch.cuda.is_initialized():
                    torch.cuda.reset_peak_memory_stats()
                gradients, computed = timed(partial(self._gradients, cut, trained, batch, features))
            for copy, gradient in zip(copies, gradients, strict=True):
                copy.grad = gradient
            _, stepped = timed(lambda: self._step(optimizer, copies))
            del gradients
            if number >= _WARMUP:
                seconds.append(computed + stepped / self.accumulation)
        state = 0 if optimizer is None else sum(_tensor_bytes(state.values()) for state in optimizer.state.values())
        copied = _tensor_bytes(copies)
        if torch.cuda.is_initialized() and trained and trained[0].is_cuda:
            peak = torch.cuda.max_memory_allocated() - copied
        else:
            model = self.chain.model
            own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
            activation_bytes = sum(size for pointer, size in saved.items() if pointer not in own)
            gradient_bytes = copied if self.forward_passes is None else 0
            peak = _tensor_bytes([*model.parameters(), *model.buffers()]) + gradient_bytes + state + activation_bytes
        return statistics.median(seconds), peak

    def _gradients(
        self, cut: int, trained: list[nn.Parameter], batch: Mapping[str, Any], features: torch.Tensor | None
    ) -> Sequence[Any]:
        inputs, main_input = dict(batch), None
        if features is not None:
            main_input = inputs[self.chain.main_input] = self.chain.input_of_replay(features, batch)
        with self.chain.replay(cut, features, main_input):
            for _ in range((self.forward_passes or 1) - 1):
                self.loss(self.chain.model, dict(inputs))
            loss = self.loss(self.chain.model, inputs)
            # Not `backward`: what hangs on the parameters (a wrapper's hooks, their gradients) is not concerned.
            if not trained or not loss.requires_grad:
                return [None] * len(trained)
            return torch.autograd.grad(loss, trained, allow_unused=True)

    def _step(self, optimizer: torch.optim.Optimizer | None, copies: list[nn.Parameter]) -> None:
        if optimizer is None:
            return
        if self.max_grad_norm and self.forward_passes is None:
            torch.nn.utils.clip_grad_norm_(copies, self.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _counting_saved(saved: dict[int, int]) -> torch.autograd.graph.saved_tensors_hooks:
    """Notes the storages that a forward pass keeps for its backward pass: address -> bytes."""

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, StandIn):
            return tensor  # takes no memory
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)


def _own_loss(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    output = model(**inputs)
    loss = output.get("loss") if isinstance(output, Mapping) else None
    return first_tensor(output).float().sum() if loss is None else loss


def _tensor_bytes(values: Any) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor))
