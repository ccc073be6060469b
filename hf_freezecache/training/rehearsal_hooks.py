"""A trainer's own step on a batch, for a rehearsal: loss and gradients, without any update."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..distributed import without_buffer_sync
from ..model.modes import uncompiled, untouched
from ..model.stand_ins import StandIn
from ..model.structure import find_tensors
from ..rng import preserve_rng
from .hooks import TrainerHooks
from .rehearsal import Outcome, Step
from .trainer_state import remembering

#: What users override in the path of the loss.
_IN_THE_PATH = ("training_step", "compute_loss", "_prepare_inputs", "_prepare_input", "get_batch_samples")


class _Called(BaseException):  # no `Exception`, which code of the user's may catch
    """Ends a step as soon as it calls the model."""

    def __init__(self, args: tuple, kwargs: dict[str, Any]):
        super().__init__()
        self.arguments = args, kwargs


class RehearsalHooks(TrainerHooks):
    """Runs `training_step` as the training would, the overrides of users included."""

    def _suspects(self) -> list[str]:
        """What users have put in the path of the loss, as they would call it."""
        overriding = {name: self._overriding(name) for name in _IN_THE_PATH}
        suspects = [f"`{cls.__name__}.{name}`" for name, cls in overriding.items() if cls is not None]
        if overriding["training_step"] is not None:
            suspects[0] += " (it must call `super().training_step` with the inputs that it got)"
        if self.compute_loss_func is not None:
            suspects.append("`compute_loss_func`")
        return [*suspects, f"the forward of {type(self._own_model).__name__}"]

    @contextmanager
    def _rehearsing(self, names: Collection[str] | None = None) -> Iterator[Step]:
        """Inside, training steps run on collated batches; parameters keep their gradients, and this trainer its state.

        Args:
            names: parameters whose gradients are asked for, those of the loss; None: all that are trained, and what
                the training would follow.

        Yields:
            What runs a step on a batch, or one on each micro-batch of an update.
        """
        assert self._session is not None
        model, own = self._session.wrapped_model, self._own_model
        trained, exact = _trained(own), names is not None
        if names is not None:
            trained = {name: trained[name] for name in names}
        outputs: dict[str, torch.Tensor] = {}

        def run(*batches: Mapping[str, Any]) -> Outcome:
            outputs.clear()
            count = len(batches)
            taken, num_items_in_batch = self.get_batch_samples(iter(batches), count, self.args.device)
            self.current_gradient_accumulation_steps = len(taken)
            losses = [self.training_step(model, batch, num_items_in_batch).detach() for batch in taken]
            loss = sum(losses[1:], losses[0])
            return Outcome(loss, {name: value.detach() for name, value in outputs.items()}, captured.take())

        hook = own.register_forward_hook(lambda module, args, output: outputs.update(find_tensors(output)))
        try:
            with (
                remembering(self, own),
                self._alone(model),
                uncompiled(self._runs_compiled),  # as steps on features do; compiled code rounds otherwise
                self._capturing_gradients(trained, exact) as captured,
            ):
                yield run
        finally:
            hook.remove()

    def _called_inputs(self, batch: Any) -> dict[str, Any]:
        """What the trainer's step calls the model on, by the names of its arguments; the model itself does not run.

        Args:
            batch: as the collator returned it, of any type.

        Raises:
            ValueError: if the step does not call the model.
            Exception: whatever the step raises before it does.
        """
        own = self._own_model

        def stop(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            raise _Called(args, kwargs)

        hook = own.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with (
                preserve_rng(),
                torch.enable_grad(),
                untouched(own),
                remembering(self, own),
                self._alone(own),
                self._capturing_gradients(_trained(own)),
            ):
                batches, num_items_in_batch = self.get_batch_samples(iter([batch]), 1, self.args.device)
                self.training_step(own, batches[0], num_items_in_batch)
        except _Called as called:
            args, kwargs = called.arguments
        else:
            raise ValueError(
                f"the data collator returns {type(batch).__name__} without the model's main input by its name, and "
                f"the trainer's step does not call {type(own).__name__}: what the model takes is not known."
            )
        finally:
            hook.remove()
        positional = inspect.signature(type(own).forward).bind_partial(own, *args).arguments
        return {**dict(list(positional.items())[1:]), **kwargs}

    @contextmanager
    def _alone(self, model: torch.nn.Module) -> Iterator[None]:
        """Inside, `Trainer` and the wrapped model log nothing, and wait for no other process: it may have failed."""
        ddp = getattr(model, "_orig_mod", model)
        averages, syncs = self.args.average_tokens_across_devices, vars(ddp).get("require_forward_param_sync")
        self.args.average_tokens_across_devices = False
        self.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        try:
            with self.accelerator.no_sync(model), without_buffer_sync(model):
                yield
        finally:
            del self.log
            self.args.average_tokens_across_devices = averages
            if syncs is not None:
                ddp.require_forward_param_sync = syncs  # `no_sync` has told it to leave out the next one

    @contextmanager
    def _capturing_gradients(
        self, trained: Mapping[str, torch.nn.Parameter], exact: bool = False
    ) -> Iterator[_Captured]:
        """Inside, the backward pass of accelerate leaves parameters alone, and gradients are to be taken.

        What hangs on the parameters (a wrapper's hooks, optimizers that step in the backward pass) is not concerned.
        """
        captured = _Captured(trained)
        before = {name: parameter.grad for name, parameter in trained.items()}
        steps = vars(self).get("current_gradient_accumulation_steps")
        for parameter in trained.values():
            parameter.grad = None
        self.current_gradient_accumulation_steps = 1  # `Trainer` sets it with the first batches
        self.accelerator.backward = captured.backward
        self._captures = "exact" if exact else "own"
        try:
            yield captured
        finally:
            del self.accelerator.backward
            self._captures = None
            if steps is None:
                del self.current_gradient_accumulation_steps
            else:
                self.current_gradient_accumulation_steps = steps
            for name, parameter in trained.items():
                parameter.grad = before[name]


class _Captured:
    """Gradients of steps, in place of those in the parameters.

    Args:
        trained: parameters by name.
    """

    def __init__(self, trained: Mapping[str, torch.nn.Parameter]):
        self._trained = trained
        self._gradients: dict[str, torch.Tensor] = {}

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Stands in for the backward pass of accelerate."""
        if isinstance(loss, StandIn):
            loss.backward()  # tells what is missing
        parameters = list(self._trained.values())
        if parameters:
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for name, gradient in zip(self._trained, gradients, strict=True):
                self._add(name, gradient)

    def take(self) -> dict[str, torch.Tensor]:
        """The gradients since the last time."""
        for name, parameter in self._trained.items():
            self._add(name, parameter.grad)  # of a step that calls `loss.backward()` itself
            parameter.grad = None
        gradients, self._gradients = self._gradients, {}
        return gradients

    def _add(self, name: str, gradient: torch.Tensor | None) -> None:
        if gradient is not None:
            before = self._gradients.get(name)
            self._gradients[name] = gradient if before is None else before + gradient


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
