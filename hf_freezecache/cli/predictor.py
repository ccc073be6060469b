"""The commands for predictors: `freezecache predictor record`, `label`, `train`, `evaluate` and `push`."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict
from transformers import Trainer, TrainingArguments, set_seed

from ..augment.processors import base_pipeline, train_pipeline
from ..augment.transforms import ReplayableTransform
from ..hub.pushing import Push, push_files
from ..smartfrz.card import CARD, EVALUATION, TRAINING, write_card
from ..smartfrz.evaluation import score, without_each_network
from ..smartfrz.fitting import Fitting, fit
from ..smartfrz.history import SCALARS
from ..smartfrz.labels import LabelRule
from ..smartfrz.predictor import FreezePredictor, load_predictor
from ..smartfrz.recording import HistoryRecorder, RecordedRun, RunFacts
from ..smartfrz.windows import load_runs, split_runs
from .images import ImageCollator, encode_labels, find_columns, load_classifier, load_images

#: File of the labels' rule, in the folder of the runs.
LABELS = "labels.json"
_PROBED = 64


def record(options: argparse.Namespace) -> None:
    """Trains an image classifier with a plain `Trainer` and records it; does nothing where the file is there.

    Raises:
        OSError: if model or images do not exist.
        ValueError: if an option is not possible, or the model cannot be split.
    """
    path = Path(options.output) / f"{options.name}.safetensors"
    if path.exists():
        print(f"{path} is there already")
        return
    set_seed(options.seed)
    dataset = load_images(options.data)
    image_column, label_column = find_columns(dataset, None, None)
    dataset = encode_labels(DatasetDict(train=dataset), label_column)["train"]
    model, processor, constants = load_classifier(
        options.model, dataset.features[label_column].names, options.image_size
    )
    if options.from_scratch:
        model = type(model)(model.config)
    base = base_pipeline(processor, options.image_size)
    collator = ImageCollator(label_column, constants)
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(1))[:_PROBED].tolist()
    still = dataset.with_transform(ReplayableTransform(base, base, image_column))
    probe = {name: value for name, value in collator([still[row] for row in chosen]).items() if name != "labels"}
    settings = {
        name: getattr(options, name) for name in ("model", "epochs", "learning_rate", "scheduler", "batch_size")
    }
    facts = RunFacts(options.name, model.config.model_type, options.data_name, options.seed, [], settings)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=options.batch_size,
            num_train_epochs=options.epochs,
            learning_rate=options.learning_rate,
            lr_scheduler_type=options.scheduler,
            seed=options.seed,
            use_cpu=options.cpu,
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
        )
        transform = ReplayableTransform(train_pipeline(base, "crop", 0.35), base, image_column)
        Trainer(
            model=model,
            args=args,
            train_dataset=dataset.with_transform(transform),
            data_collator=collator,
            callbacks=[HistoryRecorder(path, facts, probe)],
        ).train()
    print(f"{path}: recorded")


def label(options: argparse.Namespace) -> None:
    """Labels recorded trainings, prints what would have been settled when, and keeps the rule beside them.

    Raises:
        OSError: if there are no runs.
        ValueError: if the rule is not possible.
    """
    folder, rule = Path(options.runs), LabelRule(options.remaining, options.floor, options.window)
    runs = load_runs(folder)
    (folder / LABELS).write_text(json.dumps(asdict(rule)) + "\n", encoding="utf-8")
    rows = [_settled(run, rule) for run in runs]
    others = [
        LabelRule(remaining, floor, rule.window)
        for remaining in (0.02, 0.05, 0.1, 0.2)
        for floor in (0.0, 0.005, 0.02)
    ]
    sensitivity = [
        {**asdict(other), "settled": float(np.mean([other.settled(run.cka)[:-1].mean() for run in runs]))}
        for other in others
    ]
    if options.json:
        print(json.dumps({"rule": asdict(rule), "runs": rows, "sensitivity": sensitivity}))
        return
    for row in rows:
        print(f"{row['run']:40} {row['settled']:4.0%} settled; by block from {row['from']}")
    print("share that is settled, by rule:")
    for entry in sensitivity:
        print(f"  remaining {entry['remaining']}, floor {entry['floor']}: {entry['settled']:.0%}")


def train(options: argparse.Namespace) -> None:
    """Trains a predictor on recorded trainings and saves it as a folder for the Hub.

    Raises:
        OSError: if there are no runs.
    """
    folder, rule = Path(options.runs), _rule_beside(Path(options.runs))
    runs = load_runs(folder)
    fitting = Fitting(epochs=options.epochs, seed=options.seed)
    settings = {"window": options.window, "variant": options.variant, "inputs": options.inputs or list(SCALARS)}
    training, validation = split_runs(runs, 0.2, options.seed)
    predictor, history = fit(training, validation or training, rule, fitting, **settings)
    output = Path(options.output)
    predictor.save_pretrained(output)
    made = {
        "label_rule": asdict(rule),
        "fitting": asdict(fitting),
        "settings": settings,
        "runs": [{**asdict(run.facts), "validates": run in validation} for run in runs],
        "history": history,
        "validation": score(predictor, validation, rule).to_dict() if validation else None,
    }
    _write(output / TRAINING, made)
    if not options.no_leave_one_out:

        def without(some: Sequence[RecordedRun]) -> FreezePredictor:
            rest, held_out = split_runs(some, 0.2, options.seed)
            return fit(rest, held_out or rest, rule, fitting, **settings)[0]

        found = without_each_network(runs, without, rule) if len({run.facts.network for run in runs}) > 1 else {}
        made["without_each_network"] = {network: scores.to_dict() for network, scores in found.items()}
        _write(output / TRAINING, made)
    write_card(output)
    print(json.dumps(made) if options.json else f"{output}: validation {made['validation']}")


def evaluate(options: argparse.Namespace) -> None:
    """Scores a predictor on recorded trainings that it has not seen, by network, and adds that to its card.

    Raises:
        OSError: if there is no predictor, or there are no runs.
    """
    folder, runs = Path(options.predictor), load_runs(Path(options.runs))
    training = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
    seen = {run["run"] for run in training["runs"]} & {run.facts.run for run in runs}
    if seen:
        raise ValueError(f"the predictor was trained on {', '.join(sorted(seen))}: evaluate it on other runs.")
    predictor, rule = load_predictor(str(folder)), LabelRule(**training["label_rule"])
    groups = {"all": runs}
    for run in runs:
        groups.setdefault(run.facts.network, []).append(run)
    scores = {name: score(predictor, own, rule, options.threshold).to_dict() for name, own in groups.items()}
    _write(folder / EVALUATION, {"threshold": options.threshold, "scores": scores})
    write_card(folder)
    print(json.dumps(scores) if options.json else "\n".join(f"{name}: {found}" for name, found in scores.items()))


def push(options: argparse.Namespace) -> None:
    """Pushes a predictor to the Hub.

    Raises:
        OSError: if there is none.
        HeadError: if the Hub refuses it.
    """
    folder = Path(options.predictor)
    load_predictor(str(folder))  # a damaged one is found out now
    files = [
        name for name in ("config.json", "model.safetensors", CARD, TRAINING, EVALUATION) if (folder / name).is_file()
    ]
    again = f"`freezecache predictor push {folder} {options.repo}`"
    commit = push_files(folder, files, Push(options.repo, options.private or None), "the predictor", again)
    print(json.dumps({"url": commit.commit_url}) if options.json else f"pushed: {commit.commit_url}")


def _settled(run: RecordedRun, rule: LabelRule) -> dict[str, Any]:
    labels = rule.settled(run.cka)
    first = [int(column.argmax()) if column.any() else None for column in labels.T]
    return {"run": run.facts.run, "network": run.facts.network, "settled": float(labels[:-1].mean()), "from": first}


def _rule_beside(folder: Path) -> LabelRule:
    path = folder / LABELS
    return LabelRule(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else LabelRule()


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
