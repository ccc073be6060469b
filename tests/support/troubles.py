"""What goes wrong on one process alone, in the middle of a replay epoch."""

from __future__ import annotations

import torch
from transformers import TrainerCallback

from hf_freezecache import FeatureStore
from hf_freezecache.cache.manifest import StoreError


class Trouble(TrainerCallback):
    """Base: something happens in one step.

    Args:
        step: the optimizer step, from 0.
    """

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.begin(model)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step + 1:
            self.end()

    def begin(self, model):
        raise NotImplementedError

    def end(self):
        """What lasts for the step only is over."""


class Loses(Trouble):
    """The disk of this process's machine cannot be read until the epoch ends."""

    def begin(self, model):
        self.read_rows = FeatureStore.read_rows

        def fail(*args, **kwargs):
            raise StoreError("the disk is gone.")

        FeatureStore.read_rows = fail

    def on_epoch_end(self, args, state, control, **kwargs):
        if state.global_step > self.step:
            FeatureStore.read_rows = self.read_rows


class Changes(Trouble):
    """A frozen parameter gets other values."""

    def begin(self, model):
        with torch.no_grad():
            next(model.parameters()).mul_(1.5)


class Peeks(Trouble):
    """A hook reads the images, as one that logs does now and then."""

    def begin(self, model):
        self.handle = model.register_forward_pre_hook(peek, with_kwargs=True)

    def end(self):
        self.handle.remove()


class PeeksInEvaluation(Trouble):
    """The same from the second batch on of the first evaluation after the step."""

    handle = None

    def begin(self, model):
        """Nothing happens in the step itself."""

    def on_prediction_step(self, args, state, control, model=None, **kwargs):
        if state.global_step > self.step and self.handle is None:
            self.handle = model.register_forward_pre_hook(peek, with_kwargs=True)

    def on_evaluate(self, args, state, control, **kwargs):
        if self.handle is not None:
            self.handle.remove()


def peek(module, args, kwargs):
    float(kwargs["pixel_values"].mean())


TROUBLES = {"loses": Loses, "changes": Changes, "peeks": Peeks, "peeks in evaluation": PeeksInEvaluation}
