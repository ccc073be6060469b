"""Supervised fine-tuning of a causal language model with a `FreezeCacheTrainer`: prompts and completions.

    python recipes/causal_lm_sft.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --train_files train.json \\
        --output_dir outputs/sft --policy manual --freeze_points 0:16

Rows have a prompt and a completion (`--prompt_column`, `--completion_column`), from csv, json or parquet files
(`--train_files`) or a data set on the hub (`--dataset_name`). The loss is that of the completion: labels are -100 on
the prompt, and on the padding that the collator adds on the right of each batch.
"""

import math
import sys
from dataclasses import asdict, dataclass, field

from _common import Stopwatch, finish, load_rows, one_line_errors
from datasets import DatasetDict
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer, plan


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Hub id or folder of a causal language model."})
    max_seq_length: int = field(default=512, metadata={"help": "Longer rows are truncated to this many tokens."})


@dataclass
class DataArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "Hub id of a data set."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_files: list[str] | None = field(default=None, metadata={"help": "csv, json or parquet files."})
    validation_files: list[str] | None = field(default=None, metadata={"help": "Files of validation rows."})
    validation_split: float = field(
        default=0.1,
        metadata={"help": "Share of the training rows that is used for validation if no validation rows are given."},
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the prompts."})
    completion_column: str = field(default="completion", metadata={"help": "Column of the completions."})
    limit: int | None = field(default=None, metadata={"help": "Use this many rows of each split."})
    plan: bool = field(
        default=False,
        metadata={
            "help": "Measure on a few batches what a store at every cut would cost and save, print that and exit."
        },
    )


def tokenize(splits: DatasetDict, args: DataArguments, tokenizer: PreTrainedTokenizerBase, most: int) -> DatasetDict:
    """Rows of tokens, each of its own length; labels are -100 on the prompt."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def encode(row: dict) -> dict:
        prompt = [*begin, *tokenizer(row[args.prompt_column], add_special_tokens=False)["input_ids"]]
        completion = tokenizer(row[args.completion_column], add_special_tokens=False)["input_ids"]
        ids = [*prompt, *completion, tokenizer.eos_token_id][:most]
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels[:most]}

    return splits.map(encode, remove_columns=splits["train"].column_names, desc="tokenizing")


def main(argv: list[str] | None = None) -> dict:
    """Trains, evaluates, saves the model and `report.json` in the output folder; returns the report's content.

    With `--plan` it only prints and returns the plan.
    """
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments, FreezeCacheConfig))
    model_args, data_args, training_args, freeze_cache = parser.parse_args_into_dataclasses(argv)
    set_seed(training_args.seed)

    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    with training_args.main_process_first(desc="loading the data set"):
        splits = load_rows(
            data_args.dataset_name,
            data_args.dataset_config_name,
            data_args.train_files,
            data_args.validation_files,
            data_args.validation_split,
            training_args.seed,
        )
        for column in (data_args.prompt_column, data_args.completion_column):
            if column not in splits["train"].column_names:
                raise ValueError(f"there is no column {column!r} among {', '.join(splits['train'].column_names)}")
        if data_args.limit is not None:
            splits = DatasetDict(
                {name: split.select(range(min(data_args.limit, len(split)))) for name, split in splits.items()}
            )
        splits = tokenize(splits, data_args, tokenizer, model_args.max_seq_length)
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path)
    collator = DataCollatorForSeq2Seq(tokenizer)

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
        processing_class=tokenizer,
        callbacks=[stopwatch],
        freeze_cache=freeze_cache,
    )
    facts = {
        "model": model_args.model_name_or_path,
        "train_rows": len(splits["train"]),
        "validation_rows": len(splits["validation"]),
    }
    return finish(trainer, stopwatch, facts, lambda metrics: f"perplexity {math.exp(metrics['eval_loss']):.2f}")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
