"""Zeroth-order trainings of tiny models."""

from __future__ import annotations

from transformers import Trainer, TrainerCallback

from hf_freezecache import FreezeCacheMixin, ZeroOrderConfig, ZeroOrderMixin
from support.helpers import make_args, pixel_dataset, tiny_vit

COPY = {"restore_weights": "copy"}
CONFIGS = {
    "gaussian": {},
    "uniform": {"distribution": "uniform"},
    "pool": {"number_reuse": "pool", "pool_size": 255},
    "on the fly": {"number_reuse": "on_the_fly", "modulus_scaling": "exact"},
    "one-sided": {"estimator": "one_sided", "estimates": 3},
}


class PlainZeroOrder(ZeroOrderMixin, Trainer):
    pass


def train(folder, trainer_class=PlainZeroOrder, model=None, config=None, resume=None, zero_order=None, **settings):
    names = ("callbacks", "eval_dataset", "optimizers", "policy", "train_dataset")
    own = {name: settings.pop(name) for name in names if name in settings}
    if issubclass(trainer_class, FreezeCacheMixin):
        own["freeze_cache"] = config
    settings = {"num_train_epochs": 2, "max_grad_norm": 0.0, "lr_scheduler_type": "constant", **settings}
    trainer = trainer_class(
        model=tiny_vit() if model is None else model,
        args=make_args(folder, **settings),
        zero_order=ZeroOrderConfig(**(zero_order or {})),
        **{"train_dataset": pixel_dataset(rows=24), **own},
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Seen(TrainerCallback):
    """What there is at the end of every step."""

    def __init__(self):
        self.weights, self.gradients, self.states = [], 0, 0

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.gradients += sum(parameter.grad is not None for parameter in model.parameters())

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.weights.append(weights_of(model))
        self.states += len(optimizer.state)


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}
