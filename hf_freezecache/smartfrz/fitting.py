"""Training a predictor on recorded trainings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..rng import seeded_rng
from .labels import LabelRule
from .predictor import FreezePredictor
from .recording import RecordedRun
from .windows import Windows, make_windows


@dataclass(frozen=True)
class Fitting:
    """How a predictor is trained: briefly, so that it does not learn the networks it sees by heart.

    Args:
        epochs: over all windows.
        learning_rate: of AdamW, halved when the validation loss has not fallen for two epochs.
        weight_decay: of AdamW.
        batch_size: windows of a step.
        clip: norm to which gradients are clipped.
        seed: of the initialization and the order.
    """

    epochs: int = 5
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    batch_size: int = 256
    clip: float = 1.0
    seed: int = 0


def fit(
    training: Sequence[RecordedRun],
    validation: Sequence[RecordedRun],
    rule: LabelRule,
    fitting: Fitting | None = None,
    **settings: Any,
) -> tuple[FreezePredictor, list[dict[str, float]]]:
    """Trains a predictor; the one of the epoch with the smallest validation loss is returned.

    Args:
        training: recorded runs.
        validation: others.
        rule: of the labels.
        fitting: how it is trained.
        settings: of the predictor.

    Returns:
        The predictor in eval mode, and losses by epoch.
    """
    fitting = Fitting() if fitting is None else fitting
    with seeded_rng(fitting.seed, "predictor"):
        predictor = FreezePredictor(**settings)
        windows, held_out = (
            make_windows(runs, rule, predictor.window, predictor.variant) for runs in (training, validation)
        )
        optimizer = torch.optim.AdamW(
            predictor.parameters(), lr=fitting.learning_rate, weight_decay=fitting.weight_decay
        )
        scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=2)
        history, best = [], (float("inf"), {name: value.clone() for name, value in predictor.state_dict().items()})
        for epoch in range(fitting.epochs):
            loss = _train_epoch(predictor, windows, optimizer, fitting)
            with torch.no_grad():
                validation_loss = float(loss_of(predictor, held_out))
            scheduler.step(validation_loss)
            history.append({"epoch": epoch, "loss": loss, "validation_loss": validation_loss})
            if validation_loss < best[0]:
                best = validation_loss, {name: value.clone() for name, value in predictor.state_dict().items()}
    predictor.load_state_dict(best[1])
    return predictor.eval(), history


def _train_epoch(
    predictor: FreezePredictor, windows: Windows, optimizer: torch.optim.Optimizer, fitting: Fitting
) -> float:
    predictor.train()
    total = 0.0
    for rows in torch.randperm(len(windows)).split(fitting.batch_size):
        loss = loss_of(predictor, windows, rows)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(predictor.parameters(), fitting.clip)
        optimizer.step()
        total += float(loss.detach()) * len(rows)
    return total / len(windows)


def loss_of(predictor: FreezePredictor, windows: Windows, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
    """Weighted cross-entropy of some windows."""
    logits = predictor(windows.histories[rows], windows.lengths[rows])
    losses = nn.functional.cross_entropy(logits, windows.labels[rows], reduction="none")
    weights = windows.weights[rows]
    return (losses * weights).sum() / weights.sum()
