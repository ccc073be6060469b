"""Trains the small ViT on CIFAR-10 that `quickstart.py` fine-tunes, and writes its weights in half precision.

    python recipes/pretrain_tiny_vit.py --data ../shared/data/cifar10

The folder of the data has parquet files `train-*` and `test-*` with columns `image` and `label`.
"""

import argparse
import sys
from pathlib import Path

import torch
from _common import one_line_errors, recipes_extra, write_json
from datasets import load_dataset
from metrics import make_compute_metrics
from torch.utils.data import Dataset
from torchvision.transforms import v2
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

with recipes_extra():
    import numpy as np

CONFIG = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "hidden_dropout_prob": 0.0,
}
#: The pixels that `quickstart.py` gives the model, too.
NORMALIZE = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])
AUGMENT = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), NORMALIZE])


class Images(Dataset):
    """Decoded images in memory, each transformed when it is read."""

    def __init__(self, files: str, transform: v2.Transform, limit: int | None):
        rows = load_dataset("parquet", data_files=files, split="train")
        rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
        self.names = rows.features["label"].names
        self.labels = rows["label"][:]
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in rows["image"]])
        self.images, self.transform = torch.from_numpy(pixels).permute(0, 3, 1, 2), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict:
        return {"pixel_values": self.transform(self.images[row]), "labels": self.labels[row]}


def main(argv: list[str]) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of the parquet files")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--limit", type=int, help="use this many images of each split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="recipes/tiny_vit_cifar10")
    options = parser.parse_args(argv)
    set_seed(options.seed)
    train = Images(f"{options.data}/train-*.parquet", AUGMENT, options.limit)
    test = Images(f"{options.data}/test-*.parquet", NORMALIZE, options.limit)
    names = dict(enumerate(train.names))
    model = ViTForImageClassification(ViTConfig(**CONFIG, id2label=names, label2id={v: k for k, v in names.items()}))
    args = TrainingArguments(
        output_dir="outputs/pretrain_tiny_vit",
        num_train_epochs=options.epochs,
        per_device_train_batch_size=128,
        per_device_eval_batch_size=250,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.05,
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="epoch",
        disable_tqdm=True,
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),
        seed=options.seed,
    )
    trainer = Trainer(
        model=model, args=args, train_dataset=train, eval_dataset=test, compute_metrics=make_compute_metrics()
    )
    trainer.train()
    trained = trainer.model.vit.eval().half()  # without the head, which a fine-tuning makes anew
    trained.save_pretrained(options.output_dir)
    result = {
        "images": len(train),
        "epochs": options.epochs,
        "seed": options.seed,
        "test_accuracy": trainer.state.log_history[-2]["eval_accuracy"],
        "parameters": trained.num_parameters(),
        "torch": torch.__version__,
    }
    write_json(Path(options.output_dir) / "training.json", result)
    return result


if __name__ == "__main__":
    with one_line_errors():
        print(main(sys.argv[1:]))
