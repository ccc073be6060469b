"""Zeroth-order steps in a `Trainer`: losses around the weights in the place of loss and backward pass."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import Trainer
from transformers.utils import logging

from ..distributed import Announcer, Group
from ..rng import RngState
from .config import ZeroOrderConfig
from .digits import DigitWatch
from .estimates import Estimate, look_around, mean
from .numbers import as_double
from .optimizer import TrialMoves, ZeroOrderOptimizer
from .perturbation import Displacement
from .preconditions import check_freezing, check_trainer, why_hard

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object  # what stands behind the mixin is known where they are mixed

logger = logging.get_logger(__name__)

#: Accelerate sets it on a model that it has prepared, and leaves such a one as it is.
_PREPARED = "_is_accelerate_prepared"
#: A loss that goes on to the backward pass is a multiple of what `compute_loss` gave, but for rounding.
_ROUNDING = 1e-4


class ZeroOrderMixin(_Trainer):
    """Adds zeroth-order training to a `Trainer`: `class MyTrainer(ZeroOrderMixin, AnyTrainerSubclass)`.

    A step runs the trainer's loss a few times with the weights moved along a direction, in eval mode and without
    gradients, and then moves the weights against it. Schedules, logs, checkpoints, callbacks and evaluations stay
    those of that trainer. With `FreezeCacheTrainer`, steps on features run the suffix alone.

    Args:
        zero_order: how slopes are estimated; None means the defaults.

    Raises:
        ValueError: at `train()`, if the trainer's settings or the model do not go with it.
    """

    # Set by `FreezeCacheMixin`: a `FreezePolicy` and a `FreezeCacheConfig`. Without it there are none.
    _freeze_policy: Any = None
    _freeze_config: Any = None
    # Set by `FreezeCacheMixin`: a session that counts FLOPs. Without it there is none.
    _session: Any = None
    # Read by `FreezeCacheMixin`, which counts FLOPs.
    _forward_passes: int | None
    # Set by `FreezeCacheMixin` while it runs steps for what they compute: the gradients that the training would follow
    # ("own"), or those of the loss ("exact"). None: the step that runs is one of the training.
    _captures: Literal["own", "exact"] | None = None

    def __init__(self, *args, zero_order: ZeroOrderConfig | None = None, **kwargs):
        self._zero_order = ZeroOrderConfig() if zero_order is None else zero_order
        self._forward_passes = self._zero_order.forward_passes
        # Losses of the batches since the last step of the optimizer, summed; and what the last full step has found.
        self._losses: torch.Tensor | None = None
        self._estimate: Estimate | None = None
        self._saw_digits = False
        super().__init__(*args, **kwargs)
        if self._freeze_config is not None and self._freeze_config.head_start_epochs is None:
            # It follows gradients, if only of the head.
            self._freeze_config = replace(self._freeze_config, head_start_epochs=0)

    def train(self, *args, **kwargs):
        """As `Trainer`'s; a later training of the same model that follows gradients gets its wrapper."""
        was_prepared = _PREPARED in vars(self.model) if isinstance(self.model, nn.Module) else False
        try:
            return super().train(*args, **kwargs)
        finally:
            if not was_prepared and self.model is not None:
                vars(self.model).pop(_PREPARED, None)

    # The optimizer

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        check_trainer(self)
        if self._freeze_policy is not None:
            check_freezing(self._freeze_policy, self._freeze_config)
        self._losses, self._estimate, self._saw_digits = None, None, False
        if self.optimizer is None:
            if (why := why_hard(self.accelerator.unwrap_model(self.model))) is not None:
                self._announcer.warning(why)
            settings = {"lr": self.args.learning_rate, "config": self._zero_order, "seed": self.args.seed}
            self.optimizer_cls_and_kwargs = (ZeroOrderOptimizer, settings)
        optimizer = super().create_optimizer(*args, **kwargs)
        self._own_optimizer  # noqa: B018  # raises if it is somebody else's
        return optimizer

    def make_trial_moves(self, parameters: Sequence[nn.Parameter]) -> ZeroOrderOptimizer:
        """What moves parameters as a step of the training does, whatever the losses are."""
        return TrialMoves(parameters, self.args.learning_rate, self._zero_order, self.args.seed)

    @property
    def _own_optimizer(self) -> ZeroOrderOptimizer:
        """The optimizer, not wrapped.

        Raises:
            ValueError: if it is none of this package.
        """
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # as accelerate wraps it
        if not isinstance(optimizer, ZeroOrderOptimizer):
            raise ValueError(
                f"a zeroth-order training has its own optimizer, but `optimizers` or `create_optimizer` gave "
                f"{type(optimizer).__name__}: leave them out."
            )
        return optimizer

    @property
    def _announcer(self) -> Announcer:
        return Announcer(self._group, logger)

    @property
    def _group(self) -> Group:
        return Group(self.accelerator.process_index, self.accelerator.num_processes)

    def _prepare_for_training(self, *args, **kwargs):
        """As `Trainer` does, without a wrapper that keeps buffers for gradients: processes exchange losses alone."""
        prepare = self.accelerator.prepare_model

        def prepare_whole(model: nn.Module, *args, **kwargs) -> nn.Module:
            prepared = prepare(model, *args, **{**kwargs, "evaluation_mode": True})
            # The wrapper would begin so, too.
            self._group.broadcast_tensors([each.detach() for each in (*prepared.parameters(), *prepared.buffers())])
            return prepared

        with _replaced(self.accelerator, "prepare_model", prepare_whole):
            return super()._prepare_for_training(*args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """There is no gradient; the estimate was clipped where it was made."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        return float("nan") if self._estimate is None else self._estimate.norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:  # type: ignore[override]  # `Trainer` adds floats
        found = super().floating_point_ops(inputs)
        # `Trainer` counts a forward pass, and a backward pass of two; a session counts what runs.
        return found if self._session is not None else found * self._zero_order.forward_passes / 3

    # Steps

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs) -> torch.Tensor:
        step = super().training_step
        if self._captures == "exact" or self.optimizer is None:
            return step(model, inputs, *args, **kwargs)
        taken = _Taken()
        with self._taking(taken):
            loss = step(model, inputs, *args, **kwargs)
        losses = taken.total()
        if self._captures is not None:
            self._show_gradients(losses)
            return loss
        self._losses = losses if self._losses is None else self._losses + losses
        if self.accelerator.sync_gradients:
            self._finish_step()
        return loss

    @property
    def _directions(self) -> range:
        """Those of the running step: a function of its number, so that a resumed training takes the same ones."""
        count = self._zero_order.estimates
        return range(self.state.global_step * count, (self.state.global_step + 1) * count)

    @contextmanager
    def _taking(self, taken: _Taken) -> Iterator[None]:
        """Inside, the trainer's step takes its loss at several places, and there is no backward pass."""
        compute, config, perturbation = self.compute_loss, self._zero_order, self._own_optimizer.perturbation
        copies = self._captures is not None or config.copies(perturbation.live)

        def compute_around(model: nn.Module, inputs: Any, *args, **kwargs) -> Any:
            rest: tuple = ()
            generators: RngState | None = None

            def run() -> torch.Tensor:
                nonlocal rest, generators
                if generators is None:
                    generators = RngState()
                else:
                    generators.restore()  # a loss that draws numbers gets the same ones at every place
                torch.clear_autocast_cache()  # of the weights, which have moved
                with self._watching_digits() as check:
                    answer = compute(model, copy.copy(inputs), *args, **kwargs)
                loss, *others = answer if isinstance(answer, tuple) else (answer,)
                check(loss)
                rest = tuple(others)
                return loss.detach().mean()

            with torch.no_grad(), _evaluating(model), Displacement(perturbation, copies) as displacement:
                losses = look_around(displacement, self._directions, config.eps, config.estimator, run)
            loss = taken.add(torch.stack(losses), shown=1 if config.estimator == "one_sided" else len(losses))
            return (loss, *rest) if rest else loss

        with _replaced(self, "compute_loss", compute_around), _replaced(self.accelerator, "backward", taken.backward):
            yield

    @contextmanager
    def _watching_digits(self) -> Iterator[Callable[[torch.Tensor], None]]:
        """Inside, the first loss of a training with weights of 16 bits is watched; what it gives checks that loss.

        Raises:
            ValueError: by the check, if the loss has too few digits.
        """
        if not self._saw_digits:
            self._saw_digits = all(each.element_size() >= 4 for each in self._own_optimizer.perturbation.live)
        if self._saw_digits:
            yield lambda loss: None
            return

        def check(loss: torch.Tensor) -> None:
            if (why := watch.check(loss)) is not None:
                self._announcer.warning(why)
            self._saw_digits = True

        with DigitWatch() as watch:
            yield check

    def _estimate_from(self, losses: torch.Tensor) -> Estimate:
        config = self._zero_order
        return Estimate(self._directions, losses.tolist(), config.eps, config.estimator)

    def _finish_step(self) -> None:
        """The batches of an optimizer step are through: processes exchange the losses, and nothing else."""
        losses, self._losses = self._losses, None
        assert losses is not None  # a batch has been before
        self._group.average_tensors([losses])
        self._estimate = self._estimate_from(losses)
        if self._estimate.is_finite:
            self._own_optimizer.gradients = self._estimate.gradients(self.args.max_grad_norm)
        else:
            self._announcer.warning(
                f"Step {self.state.global_step} has a loss that is no number ({self._estimate.losses}): the weights "
                "stay as they are. A smaller `eps` or learning rate may help."
            )

    def _show_gradients(self, losses: torch.Tensor) -> None:
        """Puts what the training would follow where gradients are looked for."""
        optimizer, gradients = self._own_optimizer, self._estimate_from(losses).gradients()
        for parameter in optimizer.perturbation.live:
            parameter.grad = optimizer.perturbation.combine(parameter, gradients)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self._estimate is not None:
            found = self._estimate
            logs = {
                **logs,
                "zero_order/loss_ahead": mean(found.ahead),
                "zero_order/loss_behind": mean(found.behind),
                "zero_order/projected_gradient": mean(found.slopes),
                "zero_order/numbers_drawn": self._own_optimizer.perturbation.numbers.drawn,
            }
        super().log(logs, *args, **kwargs)


class _Taken:
    """The losses that a trainer's step has taken, and what it has made of them before the backward pass."""

    def __init__(self):
        self._calls: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._total: torch.Tensor | None = None

    def add(self, losses: torch.Tensor, shown: int) -> torch.Tensor:
        """Takes the losses of a batch at several places.

        Args:
            losses: of shape `(places,)`.
            shown: the trainer's step goes on with the mean of as many.

        Returns:
            That, as a number whose derivative tells what the step has made of it.
        """
        shown_loss = losses[:shown].mean().requires_grad_()
        self._calls.append((shown_loss, as_double(losses)))
        return shown_loss

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Stands in for the backward pass of accelerate: a step may divide the loss, or add several.

        Raises:
            ValueError: if the step goes on with anything else.
        """
        if not loss.requires_grad:
            raise ValueError(
                "the training step does not go on with what `compute_loss` gave it: zeroth-order training takes its "
                "losses there."
            )
        shown = [each for each, _ in self._calls]
        others = [leaf for leaf in _leaves(loss) if not any(leaf is each for each in shown)]
        factors = torch.autograd.grad(loss, shown, allow_unused=True)
        pairs = [(each, factor) for each, factor in zip(shown, factors, strict=True) if factor is not None]
        expected, value = sum(each.item() * factor.item() for each, factor in pairs), loss.item()
        if others or (math.isfinite(value) and not math.isclose(value, expected, rel_tol=_ROUNDING, abs_tol=1e-9)):
            raise ValueError(
                "the training step adds something to what `compute_loss` gave it, or changes it in another way than "
                "by a factor: zeroth-order training would not see that. Do it in `compute_loss`."
            )
        for factor, (_, losses) in zip(factors, self._calls, strict=True):
            if factor is not None:
                scaled = losses * as_double(factor).to(losses.device)
                self._total = scaled if self._total is None else self._total + scaled

    def total(self) -> torch.Tensor:
        """The losses as the backward pass would have got them, float64 `(places,)`.

        Raises:
            ValueError: if there was none.
        """
        if self._total is None:
            raise ValueError(
                "the training step has not taken a loss by `self.compute_loss` to `self.accelerator.backward`, as "
                "that of `Trainer` does: zeroth-order training does not go with this trainer."
            )
        return self._total


def _leaves(loss: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a number was computed from by operations that autograd has recorded."""
    if loss.is_leaf:
        return [loss]
    found, seen, waiting = [], set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting += [each for each, _ in node.next_functions]
    return found


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode: losses of one step must not differ by dropout."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            if module.training != training:
                object.__setattr__(module, "training", training)


@contextmanager
def _replaced(owner: Any, name: str, value: Callable) -> Iterator[None]:
    """Inside, an object has another method; an earlier one of its own comes back."""
    own = vars(owner)
    had_own, before = name in own, own.get(name)
    own[name] = value
    try:
        yield
    finally:
        if had_own:
            own[name] = before
        else:
            del own[name]
