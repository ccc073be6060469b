"""Zeroth-order trainings of tiny models."""

from __future__ import annotations

from transformers import Trainer

from hf_freezecache import FreezeCacheMixin, ZeroOrderConfig, ZeroOrderMixin
from support.helpers import make_args, pixel_dataset, tiny_vit


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
