"""Fine-tunes any image classifier of Transformers with a `FreezeCacheTrainer`.

    python recipes/image_classification.py --model_name_or_path facebook/deit-tiny-patch16-224 \\
        --train_files train.parquet --validation_files test.parquet --output_dir outputs/run \\
        --num_train_epochs 12 --freeze_points 4:9 --policy manual

Images come from a data set on the hub (`--dataset_name`), parquet files (`--train_files`) or a folder with one folder
per class (`--train_dir`). Training images are augmented: a random resized crop and a flip, which replay epochs go on
with. Evaluation images are resized and cropped as the model's processor says.
"""

import inspect
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from _common import Stopwatch, peak_memory_bytes, write_json
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset
from metrics import make_compute_metrics
from torchvision.transforms import InterpolationMode, v2
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    HfArgumentParser,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer, ReplayableTransform, plan


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Hub id or folder of an image classifier."})
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the square images; the model's own if not given."}
    )


@dataclass
class DataArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "Hub id of a data set."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_files: list[str] | None = field(default=None, metadata={"help": "Parquet files, patterns allowed."})
    validation_files: list[str] | None = field(default=None, metadata={"help": "Parquet files, patterns allowed."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder with one folder of images per class."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same for validation."})
    validation_split: float = field(
        default=0.1, metadata={"help": "Share of the training images kept for validation if there are no others."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Found by its type if not given."})
    label_column: str | None = field(default=None, metadata={"help": "Found by its type if not given."})
    augmentation: str = field(
        default="crop",
        metadata={
            "help": "Of training images: 'crop' (random resized crop, horizontal flip), 'color' (the same and colour "
            "jitter) or 'none'."
        },
    )
    min_crop: float = field(default=0.35, metadata={"help": "Smallest share of an image that a random crop shows."})
    limit: int | None = field(default=None, metadata={"help": "Use this many shuffled images of each split."})
    plan: bool = field(
        default=False,
        metadata={"help": "Print what a store at every cut would take and save, measured on a few batches, and exit."},
    )

    def __post_init__(self):
        if self.augmentation not in ("crop", "color", "none"):
            raise ValueError(f"--augmentation is crop, color or none, not {self.augmentation!r}")


def load_splits(args: DataArguments, seed: int) -> DatasetDict:
    """The splits `train` and `validation`, limited, with an integer `ClassLabel` in `args.label_column`."""
    sources = [args.dataset_name, args.train_files, args.train_dir]
    if sum(source is not None for source in sources) != 1:
        raise ValueError("give exactly one of --dataset_name, --train_files and --train_dir")
    if args.dataset_name:
        splits = load_dataset(args.dataset_name, args.dataset_config_name)
    elif args.train_files:
        files = {"train": args.train_files, "validation": args.validation_files}
        splits = load_dataset("parquet", data_files={name: given for name, given in files.items() if given})
    else:
        folders = {"train": args.train_dir, "validation": args.validation_dir}
        splits = DatasetDict(
            {
                name: load_dataset("imagefolder", data_dir=folder, split="train")
                for name, folder in folders.items()
                if folder
            }
        )
    validation = splits.get("validation", splits.get("test"))
    if validation is None:
        halves = splits["train"].train_test_split(args.validation_split, seed=seed)
        splits = DatasetDict(train=halves["train"], validation=halves["test"])
    else:
        splits = DatasetDict(train=splits["train"], validation=validation)

    find_columns(splits["train"], args)
    if not isinstance(splits["train"].features[args.label_column], ClassLabel):
        names = sorted({str(label) for split in splits.values() for label in split.unique(args.label_column)})
        encoder = ClassLabel(names=names)
        splits = splits.map(lambda row: {args.label_column: encoder.str2int(str(row[args.label_column]))})
        splits = splits.cast_column(args.label_column, encoder)
    if args.limit is not None:
        # Shuffled first: image folders come sorted by class.
        splits = DatasetDict(
            {name: split.shuffle(seed).select(range(min(args.limit, len(split)))) for name, split in splits.items()}
        )
    return splits


def find_columns(dataset: Dataset, args: DataArguments) -> None:
    """Fills in `args.image_column` and `args.label_column` where the user left them open."""
    features = dataset.features
    if args.image_column is None:
        args.image_column = next((name for name, kind in features.items() if isinstance(kind, Image)), None)
    if args.label_column is None:
        classes = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
        args.label_column = next(iter(classes + [name for name in ("label", "labels") if name in features]), None)
    for option, column in (("image_column", args.image_column), ("label_column", args.label_column)):
        if column not in features:
            raise ValueError(f"no {option} found among {list(features)}; name it with --{option}")


def make_transform(processor: BaseImageProcessor, image_size: int | None) -> v2.Compose:
    """The processor's pipeline as a deterministic torchvision v2 pipeline, scaled to `image_size` if that is given."""
    size, crop = processor.size, processor.crop_size if processor.do_center_crop else None
    resized = [size.height, size.width] if size.height else [size.shortest_edge]
    margin = 1.0 if crop else getattr(processor, "crop_pct", None) or 1.0
    if margin < 1 and size.shortest_edge >= 384:
        # ConvNeXt states the margin around its crop as a ratio, and crops small images only.
        resized, margin = resized * 2, 1.0
    cropped = [crop.height, crop.width] if crop else resized * 2 if len(resized) == 1 else None
    final = min(cropped or resized)
    scale = 1.0 if image_size is None else image_size / final

    mode = InterpolationMode.BICUBIC if processor.resample == 3 else InterpolationMode.BILINEAR
    steps = [v2.ToImage(), v2.Resize([round(side * scale / margin) for side in resized], mode, antialias=True)]
    if cropped:
        steps.append(v2.CenterCrop([round(side * scale) for side in cropped]))
    steps.append(v2.ToDtype(torch.float32, scale=True))
    if processor.do_normalize:
        steps.append(v2.Normalize(processor.image_mean, processor.image_std))
    return v2.Compose(steps)


def make_train_transform(base: v2.Compose, args: DataArguments) -> v2.Compose:
    """The deterministic pipeline with chance: a random part of the image, flipped or not, in other colours."""
    if args.augmentation == "none":
        return base
    resize = next(step for step in base.transforms if isinstance(step, v2.Resize))
    crops = [step.size for step in base.transforms if isinstance(step, v2.CenterCrop)]
    steps = [
        v2.ToImage(),
        v2.RandomResizedCrop(
            crops[0] if crops else resize.size, (args.min_crop, 1.0), interpolation=resize.interpolation
        ),
        v2.RandomHorizontalFlip(),
    ]
    if args.augmentation == "color":
        steps.append(v2.ColorJitter(0.3, 0.3, 0.3))
    return v2.Compose([*steps, *(step for step in base.transforms if isinstance(step, (v2.ToDtype, v2.Normalize)))])


@dataclass
class Collator:
    """Stacks rows; with `interpolate` it also tells the model to interpolate its position embeddings."""

    label_column: str
    interpolate: bool

    def __call__(self, rows: list[dict]) -> dict:
        batch = {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": torch.tensor([row[self.label_column] for row in rows]),
        }
        return {**batch, "interpolate_pos_encoding": True} if self.interpolate else batch


def load_model(args: ModelArguments, names: list[str]) -> tuple[PreTrainedModel, BaseImageProcessor, bool]:
    """The classifier with a head for `names`, its processor, and whether its positions must be interpolated."""
    config = AutoConfig.from_pretrained(
        args.model_name_or_path,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    model = AutoModelForImageClassification.from_pretrained(
        args.model_name_or_path, config=config, ignore_mismatched_sizes=True
    )
    own_size = getattr(config, "image_size", None)
    can_interpolate = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    interpolate = can_interpolate and args.image_size is not None and args.image_size != own_size
    return model, AutoImageProcessor.from_pretrained(args.model_name_or_path), interpolate


def find_checkpoint(args: TrainingArguments) -> str | None:
    """`--resume_from_checkpoint last` means the newest checkpoint in `output_dir`, or none if there is none."""
    if args.resume_from_checkpoint != "last":
        return args.resume_from_checkpoint
    return get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None


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
    names = splits["train"].features[data_args.label_column].names
    model, processor, interpolate = load_model(model_args, names)
    base = make_transform(processor, model_args.image_size)
    train = make_train_transform(base, data_args)

    train_dataset = splits["train"].with_transform(ReplayableTransform(train, base, data_args.image_column))
    collator = Collator(data_args.label_column, interpolate)

    if data_args.plan:
        found = plan(model, train_dataset, freeze_cache, args=training_args, data_collator=collator)
        print(found)
        return asdict(found)

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
    trainer.train(resume_from_checkpoint=find_checkpoint(training_args))
    metrics = trainer.evaluate()
    trainer.save_model()

    phases = trainer.freeze_cache_report()
    report = {
        "model": model_args.model_name_or_path,
        "train_images": len(splits["train"]),
        "validation_images": len(splits["validation"]),
        "metrics": metrics,
        "train_seconds": stopwatch.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "curve": stopwatch.curve,
        "freeze_cache": phases.to_dict(),
    }
    if trainer.is_world_process_zero():
        write_json(Path(training_args.output_dir) / "report.json", report)
        print(phases)
        print(f"accuracy {metrics['eval_accuracy']:.4f} after {stopwatch.seconds:.1f} s of training")
    return report


if __name__ == "__main__":
    main(sys.argv[1:])
