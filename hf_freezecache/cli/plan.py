"""`freezecache plan`: prints what stores for an image classifier and a folder of images would cost and save."""

from __future__ import annotations

import argparse

import torch
from datasets import DatasetDict
from transformers import TrainingArguments

from ..augment.processors import base_pipeline, train_pipeline
from ..augment.transforms import ReplayableTransform
from ..config import FreezeCacheConfig
from ..estimate.costs import Plan
from ..planning import plan
from .images import ImageCollator, encode_labels, find_columns, load_classifier, load_images

#: Option -> field of `FreezeCacheConfig`; an option that is not given leaves the field's default.
_SETTINGS = {
    "codec": "codec",
    "progressive": "progressive",
    "views": "views",
    "cache_dir": "feature_cache_dir",
    "budget": "cache_budget",
}


def plan_images(options: argparse.Namespace) -> Plan:
    """Makes the plan for the options of the command line.

    Raises:
        ValueError: if an option is not possible; the message names it.
        OSError: if model or images do not exist.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    dataset = load_images(options.data)
    image_column, label_column = find_columns(dataset, options.image_column, options.label_column)
    dataset = encode_labels(DatasetDict(train=dataset), label_column)["train"]
    model, processor, constants = load_classifier(
        options.model, dataset.features[label_column].names, options.image_size
    )
    base = base_pipeline(processor, options.image_size)
    train = train_pipeline(base, options.augmentation, options.min_crop)
    settings = {field: getattr(options, name) for name, field in _SETTINGS.items()}
    return plan(
        model,
        dataset.with_transform(ReplayableTransform(train, base, image_column)),
        FreezeCacheConfig(
            lossless=options.lossless, **{field: value for field, value in settings.items() if value is not None}
        ),
        args=TrainingArguments(
            output_dir=".",
            per_device_train_batch_size=options.batch_size,
            dataloader_num_workers=options.workers,
            remove_unused_columns=False,
            use_cpu=options.cpu,
            bf16=options.bf16,
            report_to="none",
        ),
        data_collator=ImageCollator(label_column, constants),
        cuts=options.cuts,
        batches=options.batches,
    )
