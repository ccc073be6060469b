"""What the trainings of the benchmarks share: a clock for every arm, the accuracy, and steps on features in memory."""

from __future__ import annotations

import time

import numpy as np
from transformers import EvalPrediction, Trainer, TrainerCallback

from hf_freezecache import BlockChain


class EpochClock(TrainerCallback):
    """The same clock for every arm: seconds inside epochs, with a build at an epoch's beginning.

    Evaluations and checkpoints come between epochs and do not count. Asks for an evaluation after every
    `evaluate_every` epochs and after the last one, and for a checkpoint after the epochs in `save_after`.
    """

    def __init__(self, evaluate_every: int, save_after: set[int], stop_after: int | None = None):
        self.evaluate_every, self.save_after, self.stop_after = evaluate_every, save_after, stop_after
        self.epoch_seconds: list[float] = []
        self.evaluations: list[dict[str, float]] = []
        self.setup_seconds, self.eval_seconds = 0.0, 0.0
        self._since = time.perf_counter()

    def on_epoch_begin(self, args, state, control, **kwargs):
        if not self.epoch_seconds:
            self.setup_seconds = time.perf_counter() - self._since
        self._since = time.perf_counter()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.epoch_seconds.append(time.perf_counter() - self._since)
        epoch = round(state.epoch)
        control.should_evaluate = epoch % self.evaluate_every == 0 or epoch == state.num_train_epochs
        control.should_save = epoch in self.save_after
        if epoch == self.stop_after:
            control.should_evaluate = control.should_training_stop = True
        return control

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.eval_seconds += metrics["eval_runtime"]
        self.evaluations.append({"epoch": round(state.epoch), "accuracy": metrics["eval_accuracy"]})


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the samples whose largest logit is that of their class."""
    return {"accuracy": float((np.argmax(prediction.predictions, axis=-1) == prediction.label_ids).mean())}


class MemoryTrainer(Trainer):
    """A plain `Trainer` whose samples are features in memory: the ideal that a cache can reach."""

    def __init__(self, *args, chain: BlockChain, cut: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.chain, self.cut = chain, cut

    def training_step(self, *args, **kwargs):
        with self.chain.replay(self.cut):
            return super().training_step(*args, **kwargs)
