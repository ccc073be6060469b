"""What ImageNet-1k would cost at each cut of ViT-B/16 and ResNet-50: planned bytes, hours and disk speed.

python -m benchmarks.imagenet_plan.run --threads 2
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
from torch import nn
from transformers import (
    ConvNextImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_freezecache import FreezeCacheConfig, ReplayableTransform, plan
from hf_freezecache.augment.processors import base_pipeline, train_pipeline
from hf_freezecache.cli.images import ImageCollator

from .._common import REPOSITORY, Claim, make_parser, pick, prepare, result_folder, write_result
from .._statistics import markdown_table

#: Training images of ImageNet-1k.
IMAGES, CLASSES = 1_281_167, 1000
#: Steps on an H100, as `benchmarks/gpu` measured them: file, and by model the name of its parts.
MEASURED = "benchmarks/gpu/result_after.json", {"vit-base": "vit-base_", "resnet-50": "resnet-50_"}


def make_model(name: str) -> tuple[nn.Module, Any]:
    """A model with random weights, and its processor: neither changes what a row takes."""
    if name == "vit-base":
        return ViTForImageClassification(ViTConfig(num_labels=CLASSES)), ViTImageProcessor()
    model = ResNetForImageClassification(ResNetConfig(num_labels=CLASSES))
    return model, ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.875)


def make_images(rows: int, distinct: int, seed: int) -> datasets.Dataset:
    """A data set with as many rows as ImageNet-1k, of a few images over and over."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 255, (distinct, 12, 16, 3), np.uint8)
    pictures = [PIL.Image.fromarray(pixels).resize((500, 375)) for pixels in coarse]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=CLASSES)})
    few = datasets.Dataset.from_dict({"image": pictures, "label": list(range(distinct))}, features=features)
    return few.select(np.arange(rows) % distinct)


def plan_model(name: str, views: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Plans every cut of a model.

    Args:
        name: of the model.
        views: augmented ones that are stored.
        options: of the run.
    """
    model, processor = make_model(name)
    base = base_pipeline(processor)
    transform = ReplayableTransform(train_pipeline(base, "crop" if views else "none"), base)
    rows = make_images(options.rows, 64, options.seed).with_transform(transform)
    args = TrainingArguments(
        output_dir=str(result_folder("imagenet_plan", options.smoke)),
        per_device_train_batch_size=options.batch_size,
        remove_unused_columns=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    costs = plan(
        model,
        rows,
        FreezeCacheConfig(views=views, cache="always", cache_budget="100TB"),
        args=args,
        data_collator=ImageCollator("label"),
        cuts=options.cuts,
        batches=options.batches,
    )
    return [
        {
            "cut": row.cut,
            "block": row.block,
            "bytes": row.bytes,
            "build_hours": row.build_seconds / 3600,
            "live_epoch_hours": row.live_epoch_seconds / 3600,
            "replay_epoch_hours": row.replay_epoch_seconds / 3600,
            "plain_epoch_hours": costs.live_epoch_seconds / 3600,
        }
        for row in costs.rows
    ]


def measured_steps(model: str) -> dict[int, dict[str, float]]:
    """By cut: seconds of a step of 64 images on an H100, and bytes of a row without views."""
    file, prefixes = MEASURED
    parts = json.loads((REPOSITORY / Path(file)).read_text())["results"]
    found = {}
    for name, part in parts.items():
        result = part.get("result")
        if name.startswith(prefixes[model]) and result is not None and "int4" in name:
            sides = {side: value["step_seconds"]["median"] for side, value in result["sides"].items()}
            found[result["cut"]] = {**sides, "batch_size": result["batch_size"]}
    return found


def table(plans: Iterable[Mapping[str, Any]], steps: Mapping[int, Mapping[str, float]], rows: int) -> list[str]:
    """A line for each cut; hours on a GPU where a step was measured there."""
    lines = []
    for row in plans:
        gpu = steps.get(row["cut"], {})
        speed = gpu["batch_size"] / gpu["replay"] if gpu else None
        lines.append(
            [
                f"{row['cut']} ({row['block']})",
                f"{row['bytes_without_views'] / 1e9:.0f}",
                f"{row['bytes'] / 1e9:.0f}",
                f"{row['build_hours']:.1f}",
                f"{row['replay_epoch_hours']:.1f}",
                f"{row['replay_epoch_hours'] / row['plain_epoch_hours']:.2f}",
                f"{rows / speed / 3600:.2f}" if speed else "",
                f"{row['bytes'] / rows * speed / 1e6:.0f}" if speed else "",
            ]
        )
    return markdown_table(
        "cut | store without views, GB | with one view, GB | build, hours | replay epoch, hours | relative to a plain "
        "epoch | replay epoch on an H100, hours | disk speed below which it waits, MB/s",
        lines,
    )


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["vit-base", "resnet-50"])
    parser.add_argument("--rows", type=int, default=IMAGES)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=1, help="that are measured at each cut")
    parser.add_argument("--cuts", type=int, nargs="+", help="default: all")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.models, options.cuts, options.batch_size, options.rows = ["resnet-50"], [17], 2, 1024
    return options


def main() -> None:
    options = parse_options()
    prepare(options)
    results: dict[str, Any] = {}
    lines: list[str] = []
    claims: list[Claim] = []
    for name in options.models:
        plain = {row["cut"]: row["bytes"] for row in plan_model(name, 0, options)}
        plans = [{**row, "bytes_without_views": plain[row["cut"]]} for row in plan_model(name, 1, options)]
        results[name] = {"plan": plans, "measured_on_a_gpu": measured_steps(name)}
        lines += [f"## {name}", "", *table(plans, measured_steps(name), options.rows), ""]
        print("\n".join(lines), flush=True)
    (result_folder("imagenet_plan", options.smoke) / "table.md").write_text("\n".join(lines), encoding="utf-8")
    write_result("imagenet_plan", options, pick(options, "models rows batch_size batches cuts"), results, claims)


if __name__ == "__main__":
    main()
