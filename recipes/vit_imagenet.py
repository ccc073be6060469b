"""ViT-B/16 on ImageNet-1k: `image_classification.py` with other defaults, each of which an option overrides.

accelerate launch recipes/vit_imagenet.py                       # hub ids; ImageNet-1k asks for an accepted licence
accelerate launch --config_file recipes/accelerate/eight_gpus.yaml recipes/vit_imagenet.py
python recipes/vit_imagenet.py --train_files 'shards/train-*.tar' --validation_files 'shards/val-*.tar'
python recipes/vit_imagenet.py --train_dir train --validation_dir val --model_name_or_path folder --limit 1000

A new head learns alone for two epochs before the first one, then blocks freeze (`--policy linear`). To augment as MAE
is fine-tuned (arXiv 2111.06377): `--mixup_alpha 0.8 --cutmix_alpha 1.0 --random_erasing 0.25`. The learning rate is
that of 1,024 images a step (eight GPUs); scale it with their number.
"""

import sys

import image_classification
from _common import imagenet_defaults, one_line_errors

DEFAULTS = {
    "output_dir": "outputs/vit_imagenet",
    "num_train_epochs": "8",
    "per_device_train_batch_size": "128",
    "per_device_eval_batch_size": "256",
    "learning_rate": "1e-4",
    "weight_decay": "0.05",
    "lr_scheduler_type": "cosine",
    "warmup_steps": "0.05",
}


def main(argv: list[str]) -> dict:
    return image_classification.main(imagenet_defaults(argv, "google/vit-base-patch16-224-in21k", DEFAULTS))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
