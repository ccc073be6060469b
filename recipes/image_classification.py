"""Fine-tunes any image classifier of Transformers with a `FreezeCacheTrainer`.

    python recipes/image_classification.py --model_name_or_path facebook/deit-tiny-patch16-224 \\
        --train_files train.parquet --validation_files test.parquet --output_dir outputs/run \\
        --num_train_epochs 4 --learning_rate 1e-4 --policy manual --freeze_points 0:6 --head_start_epochs 2

This is what won at the size of the pretraining in `benchmarks/headline`: half of the blocks frozen from the start,
behind a head start. Without `--policy`, the defaults let early blocks adapt first.

Images come from a data set on the hub (`--dataset_name`), from parquet files or WebDataset's tar archives
(`--train_files`), or from a folder with one folder per class (`--train_dir`). Training images are augmented by a
random resized crop and a flip, in replay epochs too; `--random_erasing`, `--mixup_alpha` and `--cutmix_alpha` add to
that. Evaluation images are resized and cropped as the model's processor does it.
"""

import sys
from dataclasses import asdict, dataclass, field

from _common import Stopwatch, finish, one_line_errors
from datasets import DatasetDict, load_dataset
from metrics import make_compute_metrics
from transformers import HfArgumentParser, TrainingArguments, set_seed

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer, ReplayableTransform, plan
from hf_freezecache.augment.processors import AUGMENTATIONS, base_pipeline, train_pipeline
from hf_freezecache.cli.images import ImageCollator, encode_labels, find_columns, load_classifier, load_images


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Hub id or folder of an image classifier."})
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the square images (default: the model's own)."}
    )
    from_scratch: bool = field(
        default=False, metadata={"help": "Train from random weights: only config and processor are loaded."}
    )


@dataclass
class DataArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "Hub id of a data set."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_files: list[str] | None = field(
        default=None, metadata={"help": "Parquet files, or tar archives; patterns allowed."}
    )
    validation_files: list[str] | None = field(default=None, metadata={"help": "The same of validation images."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder with one folder of images per class."})
    validation_dir: str | None = field(
        default=None, metadata={"help": "Folder of validation images, one folder per class."}
    )
    validation_split: float = field(
        default=0.1,
        metadata={
            "help": "Share of the training images that is used for validation if no validation images are given."
        },
    )
    image_column: str | None = field(default=None, metadata={"help": "Default: the first column of type Image."})
    label_column: str | None = field(
        default=None, metadata={"help": "Default: the first column of type ClassLabel, or label, or labels."}
    )
    augmentation: str = field(
        default="crop",
        metadata={
            "help": "Of training images: 'crop' (random resized crop, horizontal flip), 'color' (the same and colour "
            "jitter) or 'none'."
        },
    )
    min_crop: float = field(default=0.35, metadata={"help": "Smallest share of an image that a random crop shows."})
    random_erasing: float = field(
        default=0.0, metadata={"help": "Probability that a box of a training image is replaced by zeros."}
    )
    limit: int | None = field(default=None, metadata={"help": "Use this many shuffled images of each split."})
    plan: bool = field(
        default=False,
        metadata={
            "help": "Measure on a few batches what a store at every cut would cost and save, print that and exit."
        },
    )

    def __post_init__(self):
        if self.augmentation not in AUGMENTATIONS:
            raise ValueError(f"--augmentation is one of {', '.join(AUGMENTATIONS)}, not {self.augmentation!r}")


def load_splits(args: DataArguments, seed: int) -> DatasetDict:
    """Loads the splits `train` and `validation`; fills in the names of the columns where the user gave none.

    Labels are class numbers: `args.label_column` is a `ClassLabel`.
    """
    sources = [args.dataset_name, args.train_files, args.train_dir]
    if sum(source is not None for source in sources) != 1:
        raise ValueError("give exactly one of --dataset_name, --train_files and --train_dir")
    if args.dataset_name:
        splits = load_dataset(args.dataset_name, args.dataset_config_name)
        train, validation = splits["train"], splits.get("validation", splits.get("test"))
    else:
        train = load_images(args.train_files or [args.train_dir])
        paths = args.validation_files or ([args.validation_dir] if args.validation_dir else [])
        validation = load_images(paths) if paths else None

    args.image_column, args.label_column = find_columns(train, args.image_column, args.label_column)
    splits = DatasetDict(train=train) if validation is None else DatasetDict(train=train, validation=validation)
    splits = encode_labels(splits, args.label_column)
    if validation is None:
        parts = splits["train"].train_test_split(args.validation_split, seed=seed)
        splits = DatasetDict(train=parts["train"], validation=parts["test"])
    if args.limit is not None:
        # Shuffled first: image folders come sorted by class.
        splits = DatasetDict(
            {name: split.shuffle(seed).select(range(min(args.limit, len(split)))) for name, split in splits.items()}
        )
    return splits


def main(argv: list[str] | None = None) -> dict:
    """Trains, evaluates, saves the model and `report.json` in the output folder; returns the report's content.

    With `--plan` it only prints and returns the plan.
    """
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments, FreezeCacheConfig))
    model_args, data_args, training_args, freeze_cache = parser.parse_args_into_dataclasses(argv)
    # The transform reads the image column, which no model knows by name.
    training_args.remove_unused_columns = False
    set_seed(training_args.seed)

    with training_args.main_process_first(desc="loading the data set"):
        splits = load_splits(data_args, training_args.seed)
    classes = splits["train"].features[data_args.label_column].names
    name, side = model_args.model_name_or_path, model_args.image_size
    model, processor, constants = load_classifier(name, classes, side, not model_args.from_scratch)
    base = base_pipeline(processor, side)
    train = train_pipeline(base, data_args.augmentation, data_args.min_crop, data_args.random_erasing)

    train_dataset = splits["train"].with_transform(ReplayableTransform(train, base, data_args.image_column))
    collator = ImageCollator(data_args.label_column, constants)

    if data_args.plan:
        costs = plan(model, train_dataset, freeze_cache, args=training_args, data_collator=collator)
        print(costs)
        return asdict(costs)

    stopwatch = Stopwatch()
    trainer = FreezeCacheTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=splits["validation"].with_transform(ReplayableTransform(base, base, data_args.image_column)),
        data_collator=collator,
        compute_metrics=make_compute_metrics(),
        processing_class=processor,
        callbacks=[stopwatch],
        freeze_cache=freeze_cache,
    )
    facts = {
        "model": name,
        "train_images": len(splits["train"]),
        "validation_images": len(splits["validation"]),
    }
    return finish(trainer, stopwatch, facts, lambda metrics: f"accuracy {metrics['eval_accuracy']:.4f}")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
