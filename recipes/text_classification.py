"""Fine-tunes any text classifier of Transformers with a `FreezeCacheTrainer`: `run_glue.py` with one class switched.

    python recipes/text_classification.py --model_name_or_path google-bert/bert-base-cased --output_dir outputs/mrpc \\
        --dataset_name nyu-mll/glue --dataset_config_name mrpc --policy manual --freeze_points 0:8 \\
        --head_start_epochs 2
    python recipes/text_classification.py --model_name_or_path folder --output_dir outputs/run \\
        --train_files train.csv --validation_files test.csv

Texts come from a data set on the hub (`--dataset_name`) or from csv, json or parquet files (`--train_files`). Rows
keep their own lengths; a `DataCollatorWithPadding` pads each batch to its longest text.
"""

import sys
from dataclasses import asdict, dataclass, field

from _common import Stopwatch, finish, load_rows, one_line_errors
from datasets import DatasetDict
from metrics import make_compute_metrics
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer, plan
from hf_freezecache.cli.images import encode_labels

#: Columns of texts by which well-known data sets are known, in the order in which they are looked for.
TEXT_COLUMNS = (
    *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence")),
    *(("sentence",), ("text",)),
)


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Hub id or folder of a model and its tokenizer."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer texts are truncated to this many tokens."})


@dataclass
class DataArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "Hub id of a data set."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, such as mrpc."})
    train_files: list[str] | None = field(default=None, metadata={"help": "csv, json or parquet files."})
    validation_files: list[str] | None = field(
        default=None, metadata={"help": "csv, json or parquet files of validation texts."}
    )
    validation_split: float = field(
        default=0.1,
        metadata={"help": "Share of the training texts that is used for validation if no validation texts are given."},
    )
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "One column, or two of a pair (default: sentence, text, or those of GLUE)."}
    )
    label_column: str = field(default="label", metadata={"help": "Column of the classes."})
    limit: int | None = field(default=None, metadata={"help": "Use this many shuffled texts of each split."})
    plan: bool = field(
        default=False,
        metadata={
            "help": "Measure on a few batches what a store at every cut would cost and save, print that and exit."
        },
    )


def load_splits(args: DataArguments, seed: int) -> DatasetDict:
    """Loads the splits `train` and `validation`; the label column becomes a `ClassLabel` named `label`."""
    splits = load_rows(
        args.dataset_name,
        args.dataset_config_name,
        args.train_files,
        args.validation_files,
        args.validation_split,
        seed,
    )
    if args.label_column not in splits["train"].column_names:
        raise ValueError(
            f"there is no column {args.label_column!r} among {', '.join(splits['train'].column_names)}: name it with "
            "--label_column"
        )
    splits = encode_labels(splits, args.label_column)
    if args.label_column != "label":
        splits = splits.rename_column(args.label_column, "label")
    if args.limit is not None:
        splits = DatasetDict(
            {name: split.shuffle(seed).select(range(min(args.limit, len(split)))) for name, split in splits.items()}
        )
    return splits


def find_text_columns(columns: list[str], wanted: list[str] | None) -> tuple[str, ...]:
    """Names of the one or two columns of texts."""
    candidates = TEXT_COLUMNS if wanted is None else (tuple(wanted),)
    for names in candidates:
        if len(names) <= 2 and set(names) <= set(columns):
            return names
    raise ValueError(f"found no texts among the columns {', '.join(columns)}: name one or two with --text_columns")


def tokenize(
    splits: DatasetDict, columns: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, most: int
) -> DatasetDict:
    """Rows of tokens, each of its own length, with their labels."""

    def encode(rows: dict) -> dict:
        return dict(tokenizer(*(list(rows[name]) for name in columns), truncation=True, max_length=most))

    others = [name for name in splits["train"].column_names if name != "label"]
    return splits.map(encode, batched=True, remove_columns=others, desc="tokenizing")


def main(argv: list[str] | None = None) -> dict:
    """Trains, evaluates, saves the model and `report.json` in the output folder; returns the report's content.

    With `--plan` it only prints and returns the plan.
    """
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments, FreezeCacheConfig))
    model_args, data_args, training_args, freeze_cache = parser.parse_args_into_dataclasses(argv)
    set_seed(training_args.seed)

    with training_args.main_process_first(desc="loading the data set"):
        splits = load_splits(data_args, training_args.seed)
        classes = splits["train"].features["label"].names
        tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
        columns = find_text_columns(splits["train"].column_names, data_args.text_columns)
        splits = tokenize(splits, columns, tokenizer, model_args.max_seq_length)
    config = AutoConfig.from_pretrained(
        model_args.model_name_or_path,
        num_labels=len(classes),
        id2label=dict(enumerate(classes)),
        label2id={name: number for number, name in enumerate(classes)},
    )
    model = AutoModelForSequenceClassification.from_pretrained(
        model_args.model_name_or_path, config=config, ignore_mismatched_sizes=True
    )
    collator = DataCollatorWithPadding(tokenizer)

    if data_args.plan:
        costs = plan(model, splits["train"], freeze_cache, args=training_args, data_collator=collator)
        print(costs)
        return asdict(costs)

    stopwatch = Stopwatch()
    trainer = FreezeCacheTrainer(
        model=model,
        args=training_args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        data_collator=collator,
        compute_metrics=make_compute_metrics(),
        processing_class=tokenizer,
        callbacks=[stopwatch],
        freeze_cache=freeze_cache,
    )
    facts = {
        "model": model_args.model_name_or_path,
        "train_texts": len(splits["train"]),
        "validation_texts": len(splits["validation"]),
    }
    return finish(trainer, stopwatch, facts, lambda metrics: f"accuracy {metrics['eval_accuracy']:.4f}")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
