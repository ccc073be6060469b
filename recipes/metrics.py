"""Metrics of the recipes.

`evaluate.load("accuracy")` downloads a script, which fails without a network; a metric that is a class does not.
"""

from collections.abc import Callable

import datasets
import numpy as np
from _common import recipes_extra
from transformers import EvalPrediction

with recipes_extra():
    import evaluate


class Accuracy(evaluate.Metric):
    """Share of predictions that equal their reference, in 0..1."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of predictions that equal their reference.",
            citation="",
            inputs_description="predictions and references: lists of class numbers",
            features=datasets.Features(
                {"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}
            ),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


def make_compute_metrics() -> Callable[[EvalPrediction], dict[str, float]]:
    """A `compute_metrics` for `Trainer`: accuracy of the largest logit."""
    # In memory, because each process scores what `Trainer` gathered: they must not share a scratch file.
    metric = Accuracy(keep_in_memory=True)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return metric.compute(predictions=prediction.predictions.argmax(-1), references=prediction.label_ids)

    return compute_metrics
