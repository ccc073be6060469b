"""ViT-B/16 on ImageNet-1k: `image_classification.py` with other defaults, each of which an option overrides.

accelerate launch recipes/vit_imagenet.py                       # hub ids; ImageNet-1k asks for an accepted licence
python recipes/vit_imagenet.py --train_dir train --validation_dir val --model_name_or_path folder --limit 1000

A new head learns alone for two epochs before the first one, then blocks freeze (`--policy linear`).
"""

import sys

import image_classification
from _common import one_line_errors

MODEL = "google/vit-base-patch16-224-in21k"
DATASET = "ILSVRC/imagenet-1k"
DEFAULTS = [
    *("--output_dir", "outputs/vit_imagenet"),
    *("--num_train_epochs", "8"),
    *("--per_device_train_batch_size", "128"),
    *("--per_device_eval_batch_size", "256"),
    *("--learning_rate", "1e-4"),
    *("--weight_decay", "0.05"),
    *("--lr_scheduler_type", "cosine"),
    *("--warmup_steps", "0.05"),
    *("--eval_strategy", "epoch"),
    *("--save_strategy", "epoch"),
    *("--save_total_limit", "2"),
    *("--logging_steps", "50"),
    *("--dataloader_num_workers", "8"),
]


def main(argv: list[str]) -> dict:
    options = {word.split("=")[0] for word in argv}
    defaults = [*DEFAULTS]
    if "--model_name_or_path" not in options:
        defaults += ["--model_name_or_path", MODEL]
    if not options & {"--dataset_name", "--train_files", "--train_dir"}:
        defaults += ["--dataset_name", DATASET]
    # The last of two equal options wins.
    return image_classification.main([*defaults, *argv])


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
