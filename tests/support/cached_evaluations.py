"""Trainings whose evaluations are cached, beside those that evaluate on images."""

import contextlib
import copy

import pytest
from transformers import TrainerCallback

from hf_freezecache.cache.store import FeatureStore
from support.helpers import manual, pixel_dataset, run, tiny_vit

POINTS = "1:2,2:4"
TIMES = ("_runtime", "_per_second")


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def evaluations(trainer, prefix="eval_"):
    """The logged evaluations without what differs from run to run."""
    return [
        {name: value for name, value in entry.items() if not name.endswith(TIMES)}
        for entry in trainer.state.log_history
        if any(name.startswith(prefix) for name in entry)
    ]


def train(path, cache_eval=True, model=None, size=16, config=None, points=POINTS, **settings):
    model = tiny_vit() if model is None else model
    own = dict(eval_dataset=pixel_dataset(20, size, seed=5), compute_metrics=accuracy, eval_strategy="epoch")
    config = manual(points, cache_eval=cache_eval, **(config or {}))
    return run(model, settings.pop("train", pixel_dataset(32, size)), path, config, **{**own, **settings})


def both(tmp_path, model=None, **settings):
    """The same training with evaluations on images and with cached ones."""
    trainers = []
    for cached in (False, True):
        name = "cached" if cached else "images"
        trainers.append(train(tmp_path / name, cached, model=copy.deepcopy(model), **settings))
    return trainers


def without_cached(entries):
    return [entry for entry in entries if not any("_cached_" in name for name in entry)]


def assert_close(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one == pytest.approx(other, rel=2e-3)


def messages(caplog, text):
    return [record.getMessage() for record in caplog.records if text in record.getMessage()]


def evaluation_stores(path):
    stores = [FeatureStore.open(store) for store in sorted((path / "_freeze_cache").iterdir())]
    return [store for store in stores if "for" in store.manifest.made_from["augmentation"]]


@contextlib.contextmanager
def counting(module):
    """Counts the samples that a module computes; modules inside bypassed blocks are not called at all."""
    counts = []
    handle = module.register_forward_hook(lambda module, args, output: counts.append(len(output)))
    try:
        yield counts
    finally:
        handle.remove()


class EvaluateAnother(TrainerCallback):
    """Evaluates a data set of its own in every epoch; `fresh` makes a new object every time."""

    def __init__(self, dataset, fresh=False):
        self.dataset, self.fresh, self.metrics = dataset, fresh, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 4 != 2:
            return
        dataset = self.dataset() if self.fresh else self.dataset
        self.metrics.append(self.trainer.evaluate(dataset, metric_key_prefix="other")["other_loss"])
