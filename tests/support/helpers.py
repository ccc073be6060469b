"""Tiny models, tiny data and a way to run a training and compare its trajectory."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer

CLASSES = 5


def tiny_vit(seed: int = 0, **settings) -> ViTForImageClassification:
    """4 blocks (stem included), 16x16 pixels, 17 tokens of 32 channels, with dropout."""
    torch.manual_seed(seed)
    config = dict(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=CLASSES,
        hidden_dropout_prob=0.1,
    )
    return ViTForImageClassification(ViTConfig(**{**config, **settings}))


def tiny_resnet(seed: int = 0) -> ResNetForImageClassification:
    """5 blocks (stem included) with BatchNorm, 32x32 pixels."""
    torch.manual_seed(seed)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=CLASSES
    )
    return ResNetForImageClassification(config)


def pixel_dataset(rows: int = 32, size: int = 16, seed: int = 0) -> datasets.Dataset:
    """Random pixels whose class shows in their mean."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, CLASSES, rows)
    pixels = generator.normal(size=(rows, 3, size, size)).astype(np.float32) + labels[:, None, None, None] / 2
    features = datasets.Features(
        pixel_values=datasets.Array3D((3, size, size), "float32"), labels=datasets.Value("int64")
    )
    dataset = datasets.Dataset.from_dict({"pixel_values": pixels, "labels": labels}, features=features)
    return dataset.with_format("torch")


def make_args(output_dir: Path | str, **settings) -> TrainingArguments:
    defaults = dict(
        num_train_epochs=4,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        dataloader_pin_memory=False,
    )
    return TrainingArguments(output_dir=str(output_dir), **{**defaults, **settings})


def manual(points: str, **settings) -> FreezeCacheConfig:
    """Freezes at these points and builds stores in any case: whether they pay is of no interest in tiny trainings."""
    return FreezeCacheConfig(policy="manual", freeze_points=points, **{"cache": "always", **settings})


def through(points: str = "0:2", **settings) -> FreezeCacheConfig:
    """As `manual`; live epochs write the stores."""
    return manual(points, **{"cache": "always", "materialize": "write_through", **settings})


def losses(trainer) -> list[float]:
    """The logged training losses, in order."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{len(different)} of {len(first)} tensors differ, e.g. {different[:3]}"


def run(model, dataset, output_dir, config=None, resume=None, trainer_class=FreezeCacheTrainer, **settings):
    """Trains and returns the trainer; keyword arguments named as `Trainer`'s go there, the others to the arguments."""
    own = {
        name: settings.pop(name)
        for name in (
            "callbacks",
            "data_collator",
            "compute_loss_func",
            "compute_metrics",
            "eval_dataset",
            "optimizers",
            "policy",
        )
        if name in settings
    }
    if issubclass(trainer_class, FreezeCacheTrainer):
        own["freeze_cache"] = config
    trainer = trainer_class(model=model, args=make_args(output_dir, **settings), train_dataset=dataset, **own)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def messages(caplog) -> str:
    """The log, a line a message."""
    return "\n".join(record.message for record in caplog.records)
