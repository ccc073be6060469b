"""Fine-tunes a small ViT on scikit-learn's handwritten digits with `Trainer` and with `FreezeCacheTrainer`.

    python recipes/quickstart.py                                                          # all, one after the other
    accelerate launch --multi_gpu --num_processes 2 recipes/quickstart.py --arm cached    # one, on two processes

The ViT was trained on CIFAR-10 by `pretrain_tiny_vit.py`; its weights are in `tiny_vit_cifar10/`. A third training is
plain for half of the epochs: what else the seconds that freezing saves could be had for. Prints a table, and
writes `results.json` and `comparison.png` into the output folder.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import PIL.Image
import torch
from _common import Stopwatch, one_line_errors, peak_memory_bytes, recipes_extra, write_json
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from metrics import make_compute_metrics
from torchvision.transforms import v2
from transformers import Trainer, TrainingArguments, ViTForImageClassification, set_seed

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer, save_head
from hf_freezecache.hub.card import CardFacts
from hf_freezecache.training.flops import measure_training_flops

with recipes_extra():
    import matplotlib
    import matplotlib.pyplot as plt
    from rich.console import Console
    from rich.table import Table
    from sklearn.datasets import load_digits

IMAGE_SIZE = 32
BATCH_SIZE = 32
#: Each the best of those tried on a fifth of the training images; fewer trained layers take larger steps.
LEARNING_RATES = {"plain": 1e-3, "short": 2e-3, "none": 1e-3, "cached": 2e-3}
NAMES = {
    "plain": "Trainer",
    "short": "Trainer, half of the epochs",
    "cached": "FreezeCacheTrainer",
    "none": "FreezeCacheTrainer, policy none",
}
TRANSFORM = v2.Compose(
    [v2.ToImage(), v2.Resize(IMAGE_SIZE), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
)


def load_digits_dataset(limit: int | None, seed: int) -> DatasetDict:
    """scikit-learn's 1,797 real digits of 8x8 pixels as images with labels, four fifths of them for training."""
    digits = load_digits()
    images = [PIL.Image.fromarray((image * 255 / 16).astype("uint8")) for image in digits.images]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    dataset = Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)
    splits = dataset.train_test_split(0.2, seed=seed, stratify_by_column="label")
    if limit is not None:
        splits = DatasetDict({name: split.select(range(min(limit, len(split)))) for name, split in splits.items()})
    return splits


def transform(rows: dict[str, list]) -> dict[str, list]:
    return {"pixel_values": [TRANSFORM(image.convert("RGB")) for image in rows["image"]], "labels": rows["label"]}


def make_model() -> ViTForImageClassification:
    """The pretrained ViT (2.4 MB in half precision) with a new head of ten digits."""
    return ViTForImageClassification.from_pretrained(
        Path(__file__).parent / "tiny_vit_cifar10", num_labels=10, dtype=torch.float32
    )


def epochs_of(arm: str, options: argparse.Namespace) -> int:
    """Epochs of an arm."""
    return max(1, options.epochs // 2) if arm == "short" else options.epochs


def make_trainer(arm: str, options: argparse.Namespace, splits: DatasetDict, stopwatch: Stopwatch) -> Trainer:
    """The trainer of an arm: the arms differ in class, learning rate and epochs, and in nothing else."""
    args = TrainingArguments(
        output_dir=str(Path(options.output_dir) / arm),
        num_train_epochs=epochs_of(arm, options),
        # The same batches in all, on one process and on several.
        per_device_train_batch_size=BATCH_SIZE // int(os.environ.get("WORLD_SIZE", 1)),
        per_device_eval_batch_size=64,
        learning_rate=LEARNING_RATES[arm],
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.05,
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="epoch",
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        # Said outright, because several processes on the CPU would otherwise not find each other.
        use_cpu=not torch.accelerator.is_available(),
        seed=options.seed,
    )
    kwargs = {
        "model": make_model(),
        "args": args,
        "train_dataset": splits["train"].with_transform(transform),
        "eval_dataset": splits["test"].with_transform(transform),
        "compute_metrics": make_compute_metrics(),
        "callbacks": [stopwatch],
    }
    if arm in ("plain", "short"):
        return Trainer(**kwargs)
    if arm == "none":
        config = FreezeCacheConfig(policy="none")
    else:
        # Whether a store pays is not asked here: the arms shall differ in it.
        config = FreezeCacheConfig(policy="manual", freeze_points=options.freeze_points, cache="always")
    return FreezeCacheTrainer(**kwargs, freeze_cache=config)


def run_arm(arm: str, options: argparse.Namespace) -> dict:
    """Trains one arm in this process and returns its measurements."""
    set_seed(options.seed)
    splits = load_digits_dataset(options.limit, options.seed)
    stopwatch, epochs = Stopwatch(), epochs_of(arm, options)
    trainer = make_trainer(arm, options, splits, stopwatch)
    row = splits["train"].with_transform(transform)[0]
    sample = {"pixel_values": row["pixel_values"][None], "labels": torch.tensor([row["labels"]])}
    sample = {name: value.to(trainer.args.device) for name, value in sample.items()}
    plain_flops = measure_training_flops(trainer.model, sample) * len(splits["train"]) * epochs

    trainer.train()
    result = {
        "arm": arm,
        "seed": options.seed,
        "epochs": epochs,
        "images": len(splits["train"]),
        "processes": trainer.args.world_size,
        "accuracy": trainer.evaluate()["eval_accuracy"],
        "train_seconds": stopwatch.seconds,
        "train_flops": plain_flops,
        "peak_memory_bytes": peak_memory_bytes(),
        "curve": stopwatch.curve,
        "phases": [{"mode": "live", "cut": 0, "epochs": epochs, "seconds": stopwatch.seconds}],
    }
    if arm == "cached":
        report = trainer.freeze_cache_report().to_dict()
        # A report counts what its own process computes.
        result["train_flops"] = report["totals"]["flops"] * trainer.args.world_size
        result["phases"] = [phase for phase in report["phases"] if phase["mode"] != "eval"]
    if trainer.is_world_process_zero():
        write_json(Path(options.output_dir) / f"{arm}.json", result)
        if arm == "cached":
            save_with_card(trainer, options)
    return result


def save_with_card(trainer: FreezeCacheTrainer, options: argparse.Namespace) -> None:
    """Saves what was trained, with a card; plain training's accuracy is on it if it was measured in the same way."""
    output = Path(options.output_dir)
    facts = CardFacts(
        model_name="Tiny ViT on handwritten digits",
        dataset="the handwritten digits of scikit-learn (1,797 images of 8x8 pixels; 360 of them for evaluation)",
        license="apache-2.0",
        plain=plain_metrics(output / "plain.json", options),
        limits=["Its base was trained on CIFAR-10 for 58.2 % accuracy: it shows how heads work, no more."],
    )
    folder = save_head(trainer, output / "head", card=facts)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"saved the head in {folder}: {size / 1e6:.2f} MB")


def plain_metrics(path: Path, options: argparse.Namespace) -> dict[str, float]:
    """What plain training has reached with the same seed, epochs and images; empty if that was not measured."""
    if not path.exists():
        return {}
    result = json.loads(path.read_text())
    same = (result["seed"], result["epochs"]) == (options.seed, options.epochs) and options.limit is None
    return {"accuracy": result["accuracy"]} if same else {}


def run_arm_apart(arm: str, options: argparse.Namespace) -> dict:
    """Trains one arm in a process of its own, since peak memory belongs to a process."""
    print(f"training: {arm}", flush=True)
    command = [sys.executable, __file__, "--arm", arm]
    for name in ("epochs", "limit", "seed", "output_dir", "freeze_points"):
        if getattr(options, name) is not None:
            command += [f"--{name}", str(getattr(options, name))]
    subprocess.run(command, check=True)
    return json.loads((Path(options.output_dir) / f"{arm}.json").read_text())


def print_table(results: list[dict]) -> None:
    table = Table(title=f"Digits, {results[0]['images']} images")
    table.add_column("", no_wrap=True)
    for heading in ("epochs", "accuracy", "training s", "training TFLOP", "peak memory MiB"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            NAMES[result["arm"]],
            str(result["epochs"]),
            f"{100 * result['accuracy']:.1f} %",
            f"{result['train_seconds']:.1f}",
            f"{result['train_flops'] / 1e12:.2f}",
            f"{result['peak_memory_bytes'] / 2**20:.0f}",
        )
    # Narrow terminals would cut the names.
    Console(width=100).print(table)
    for result in results:
        steps = [f"{phase['mode']} at cut {phase['cut']} {phase['seconds']:.1f} s" for phase in result["phases"]]
        print(f"{NAMES[result['arm']]}: " + ", ".join(steps))


def plot(results: list[dict], path: Path) -> None:
    """Accuracy against training seconds above, where the seconds went below."""
    matplotlib.use("Agg")
    figure, (curves, bars) = plt.subplots(2, 1, figsize=(7, 5.5), sharex=True, height_ratios=[3, 1])
    shades = {"live": "tab:blue", "build": "tab:orange", "replay": "tab:green"}
    for result in results:
        seconds = [point["seconds"] for point in result["curve"]]
        curves.plot(seconds, [100 * point["accuracy"] for point in result["curve"]], marker="o", label=result["arm"])
        start = 0.0
        for phase in result["phases"]:
            width = phase["seconds"]
            bars.barh(result["arm"], width, left=start, color=shades[phase["mode"]], edgecolor="white")
            start += width
    curves.set(ylabel="test accuracy, %")
    curves.legend()
    curves.grid(alpha=0.3)
    bars.set(xlabel="training seconds, evaluation apart")
    patches = [plt.Rectangle((0, 0), 1, 1, color=shade) for shade in shades.values()]
    bars.legend(patches, shades, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.5), frameon=False)
    bars.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--limit", type=int, help="use this many images of each split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="outputs/quickstart")
    parser.add_argument("--arm", choices=["all", *NAMES], default="all")
    parser.add_argument("--card", help="copy the head's card to this file, and the results beside it")
    # The stem and three of six layers stay as they were pretrained.
    parser.add_argument("--freeze_points", default="0:4", help="of the cached arm")
    return parser.parse_args(argv)


def main(argv: list[str]) -> list[dict]:
    options = parse_options(argv)
    arms = ["plain", "short", "cached"] if options.arm == "all" else [options.arm]
    main_process = os.environ.get("RANK", "0") == "0"
    if main_process:
        for arm in arms:
            # A cache left by an earlier run would be reused, and its build would cost nothing.
            shutil.rmtree(Path(options.output_dir) / arm, ignore_errors=True)
    # `accelerate launch` has made the processes already.
    apart = options.arm == "all" and "WORLD_SIZE" not in os.environ
    results = [run_arm_apart(arm, options) if apart else run_arm(arm, options) for arm in arms]
    if options.arm == "all" and main_process:
        print_table(results)
        write_json(Path(options.output_dir) / "results.json", {"results": results})
        plot(results, Path(options.output_dir) / "comparison.png")
        print(f"wrote {options.output_dir}/results.json and comparison.png")
        if options.card is not None:
            shutil.copyfile(Path(options.output_dir) / "head" / "README.md", options.card)
            shutil.copyfile(Path(options.output_dir) / "results.json", Path(options.card).with_suffix(".json"))
    return results


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
