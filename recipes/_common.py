"""What the recipes share."""

import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict, load_dataset
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_freezecache import FreezeCacheTrainer


@contextmanager
def recipes_extra() -> Iterator[None]:
    """Ends the program with the command that installs the missing package, if an import in this block fails.

    For the packages of the extra `recipes`, which `hf_freezecache` itself does not need.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = error.name.partition(".")[0]
        raise SystemExit(f'The recipes need the package {package}: pip install -e ".[recipes]"') from error


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with one line where a user has made a mistake; the traceback is logged at debug level.

    A wrong setting, a missing file and a model or data that do not fit are `ValueError`, `TypeError` or `OSError`.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        logging.getLogger(__name__).debug("The error of the line below", exc_info=True)
        raise SystemExit(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}") from None


def find_checkpoint(args: TrainingArguments) -> str | bool | None:
    """`--resume_from_checkpoint last` means the newest checkpoint in `output_dir`, or none if there is none.

    Returns:
        True for the newest one: the trainer passes over one that was being written when its process was killed.
    """
    if args.resume_from_checkpoint != "last":
        return args.resume_from_checkpoint
    return True if Path(args.output_dir).is_dir() and get_last_checkpoint(args.output_dir) else None


#: Settings of both recipes for ImageNet-1k.
_IMAGENET = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": "2",
    "logging_steps": "50",
    "dataloader_num_workers": "8",
}


def imagenet_defaults(argv: list[str], model: str, defaults: Mapping[str, str]) -> list[str]:
    """A command line with the defaults of a recipe for ImageNet-1k before it; of two equal options the last one wins.

    Args:
        argv: options of the user.
        model: hub id, for a user who names no model.
        defaults: further options by name.

    Returns:
        All options; with bf16 where an accelerator has it.
    """
    given = {word.split("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
    chosen = {"model_name_or_path": model, **_IMAGENET, **defaults}
    if not given & {"dataset_name", "train_files", "train_dir"}:
        chosen["dataset_name"] = "ILSVRC/imagenet-1k"
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        chosen["bf16"] = "true"
    return [word for name, value in chosen.items() for word in (f"--{name}", value)] + argv


class Stopwatch(TrainerCallback):
    """Measures the seconds of training without evaluation, for any `Trainer`; building a store counts as training.

    After training, `seconds` is the total and `curve` holds one `{"epoch", "seconds", "accuracy"}` per evaluation.
    """

    def __init__(self):
        self.seconds = 0.0
        self.curve: list[dict[str, float]] = []
        self._started: float | None = None
        self._evaluating = 0.0

    def _elapsed(self) -> float:
        return time.perf_counter() - self._started - self._evaluating

    def on_train_begin(self, args, state, control, **kwargs):
        self._started, self._evaluating = time.perf_counter(), 0.0
        self.curve.clear()

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if self._started is None:
            return
        self._evaluating += metrics["eval_runtime"]
        self.curve.append({"epoch": state.epoch, "seconds": self._elapsed(), "accuracy": metrics.get("eval_accuracy")})

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds = self._elapsed()
        self._started = None


def load_rows(
    name: str | None,
    config: str | None,
    train_files: list[str] | None,
    validation_files: list[str] | None,
    validation_split: float,
    seed: int,
) -> DatasetDict:
    """The splits `train` and `validation` of a data set on the hub, or of csv, json or parquet files.

    Args:
        name: hub id; None: the files are read.
        config: of the data set on the hub.
        train_files: of one kind.
        validation_files: of the same kind; None: a part of the training rows is split off.
        validation_split: how large a part, 0 to 1.
        seed: of that split.

    Raises:
        ValueError: if there is not exactly one source, or the files are of another kind.
        FileNotFoundError: if a file does not exist.
    """
    if (name is None) == (train_files is None):
        raise ValueError("give exactly one of --dataset_name and --train_files")
    if name is not None:
        splits = load_dataset(name, config)
    else:
        files = {"train": train_files, **({"validation": validation_files} if validation_files else {})}
        paths = [path for part in files.values() for path in part]
        for path in paths:
            if not Path(path).exists():
                raise FileNotFoundError(f"{path} does not exist.")
        kinds = {Path(path).suffix.removeprefix(".").replace("jsonl", "json") for path in paths}
        if len(kinds) != 1 or not kinds <= {"csv", "json", "parquet"}:
            raise ValueError(f"texts come from csv, json or parquet files, all of one kind, not {', '.join(paths)}")
        splits = load_dataset(kinds.pop(), data_files=files)
    validation = splits.get("validation", splits.get("test"))
    if validation is None:
        parts = splits["train"].train_test_split(validation_split, seed=seed)
        return DatasetDict(train=parts["train"], validation=parts["test"])
    return DatasetDict(train=splits["train"], validation=validation)


def finish(
    trainer: FreezeCacheTrainer,
    stopwatch: Stopwatch,
    facts: dict[str, Any],
    describe: Callable[[dict[str, float]], str],
) -> dict[str, Any]:
    """Trains, evaluates and saves; the main process writes the report to `output_dir/report.json` and prints it.

    Args:
        trainer: the trainer; the stopwatch is one of its callbacks.
        stopwatch: what has measured.
        facts: what the report begins with: model, sizes of the splits.
        describe: the result of an evaluation in words.

    Returns:
        The report.
    """
    args = trainer.args
    trainer.train(resume_from_checkpoint=find_checkpoint(args))
    metrics = trainer.evaluate()
    trainer.save_model()
    phases = trainer.freeze_cache_report()
    report = {
        **facts,
        "metrics": metrics,
        "train_seconds": stopwatch.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "curve": stopwatch.curve,
        "freeze_cache": phases.to_dict(),
    }
    if trainer.is_world_process_zero():
        write_json(Path(args.output_dir) / "report.json", report)
        print(phases)
        print(f"{describe(metrics)} after {stopwatch.seconds:.1f} s of training")
    return report


def peak_memory_bytes() -> int:
    """Peak memory of this process: allocated on the accelerator if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Linux states ru_maxrss in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
