"""Trainings are recorded as they are."""

import numpy as np
import pytest
import torch
from support.helpers import make_args, pixel_dataset, tiny_resnet, tiny_vit, weights
from transformers import Trainer

from hf_freezecache.smartfrz.history import NUM_FEATURES
from hf_freezecache.smartfrz.recording import HistoryRecorder, RecordedRun, RunFacts


def record(model, path, size, callbacks=True, **settings):
    dataset = pixel_dataset(size=size)
    facts = RunFacts("run", "net", "pixels", 0, [], {"learning_rate": 1e-3})
    recorder = HistoryRecorder(path / "run.safetensors", facts, {"pixel_values": dataset[:16]["pixel_values"]})
    trainer = Trainer(
        model=model,
        args=make_args(path, **settings),
        train_dataset=dataset,
        callbacks=[recorder] if callbacks else [],
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(("model", "size"), [(tiny_vit, 16), (tiny_resnet, 32)])
def test_recording_changes_nothing_of_the_training(model, size, tmp_path):
    recorded, plain = (record(model(), tmp_path / str(on), size, on) for on in (True, False))
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(recorded).items())
    run = RecordedRun.load(tmp_path / "True" / "run.safetensors")
    blocks = 4 if model is tiny_vit else 5
    assert len(run.facts.blocks) == blocks and run.fixed.shape == run.fresh.shape == (17, blocks, NUM_FEATURES)
    assert run.progress[0] == 0 and run.progress[-1] == 1 and len(run.progress) == 17
    assert run.cka.shape == (17, blocks) and run.cka[-1] == pytest.approx(np.ones(blocks))
    assert (run.cka[0] < run.cka[-1]).all() and np.isfinite(run.fixed).all()


def test_long_trainings_have_sixty_snapshots_and_the_finished_model(tmp_path):
    record(tiny_vit(), tmp_path, 16, num_train_epochs=31)
    run = RecordedRun.load(tmp_path / "run.safetensors")
    assert len(run.progress) == 43  # every third one of 124 steps, and the end
