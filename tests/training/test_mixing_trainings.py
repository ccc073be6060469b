"""Mixup, cutmix and noise in whole trainings, on images and on features."""

import logging

import numpy as np
import pytest
import torch
from support.helpers import make_args, manual, pixel_dataset, run, tiny_vit
from support.view_trainings import train

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer


@pytest.mark.parametrize("own_loss", [False, True])
def test_soft_labels_reach_the_loss_in_live_and_replay_epochs(own_loss, tmp_path):
    seen = []

    def loss(outputs, labels, num_items_in_batch=None):
        seen.append(labels)
        return torch.nn.functional.cross_entropy(outputs["logits"], labels)

    trainer = FreezeCacheTrainer(
        model=tiny_vit(),
        args=make_args(tmp_path, num_train_epochs=2, remove_unused_columns=False),
        train_dataset=pixel_dataset(),
        eval_dataset=pixel_dataset(seed=1),
        freeze_cache=manual("1:2", cache="always", mixup_alpha=0.5, cutmix_alpha=0.5),
        **({"compute_loss_func": loss} if own_loss else {}),
    )
    trainer.train()
    assert {phase.mode for phase in trainer.freeze_cache_report().phases} == {"live", "build", "replay"}
    if own_loss:
        steps = [labels for labels in seen if len(labels) == 8]  # those of the rehearsal are fewer
        assert len(steps) == 8 and all(labels.shape[1] == 5 for labels in seen)
        assert all(torch.allclose(labels.sum(1), torch.ones(len(labels))) for labels in seen)
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_loss_of_a_subclass_is_told_about_soft_labels(tmp_path, caplog):
    class OwnLoss(FreezeCacheTrainer):
        def compute_loss(self, model, inputs, **settings):
            return super().compute_loss(model, inputs, **settings)

    logging.getLogger("hf_freezecache").propagate = True
    config = manual("0:2", mixup_alpha=1.0)
    OwnLoss(model=tiny_vit(), args=make_args(tmp_path), train_dataset=pixel_dataset(), freeze_cache=config)
    assert "labels of probabilities" in caplog.text


def test_mixing_and_noise_change_a_replay_epoch(tmp_path):
    found = {}
    for name, settings in {"plain": {}, "mixup": dict(mixup_alpha=1.0), "noise": dict(feature_noise=0.5)}.items():
        trainer, _ = train(pixel_dataset(), tmp_path / name, **settings)
        found[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found["plain"] != found["mixup"] and found["plain"] != found["noise"]


def test_mixing_without_freezing_is_possible(tmp_path):
    config = FreezeCacheConfig(policy="none", mixup_alpha=1.0)
    plain = run(tiny_vit(), pixel_dataset(), tmp_path, FreezeCacheConfig(policy="none"), num_train_epochs=1)
    mixed = run(tiny_vit(), pixel_dataset(), tmp_path, config, num_train_epochs=1)
    first, second = ([entry.get("loss") for entry in trainer.state.log_history] for trainer in (plain, mixed))
    assert first != second


class _Vectors(torch.nn.Module):
    """Four blocks whose features are vectors."""

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"num_labels": 5})
        self.a, self.b = torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 8)
        self.c, self.d, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 5)

    def forward(self, pixel_values, labels=None):
        logits = self.head(self.d(self.c(self.b(self.a(pixel_values)))))
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def test_cutmix_of_features_without_a_grid_is_declined(tmp_path):
    config = manual("0:4", cache="always", cutmix_alpha=1.0, blocks=["a", "b", "c", "d"])
    trainer = run(_Vectors(), pixel_dataset(), tmp_path, config, num_train_epochs=1)
    assert trainer.freeze_status().cut == 4 and not trainer.freeze_status().replaying
