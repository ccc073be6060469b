"""ResNet-50 on ImageNet-1k from random weights: `image_classification.py` with other defaults, which options override.

accelerate launch recipes/resnet_imagenet.py                    # hub ids; ImageNet-1k asks for an accepted licence
accelerate launch --config_file recipes/accelerate/eight_gpus.yaml recipes/resnet_imagenet.py
python recipes/resnet_imagenet.py --train_files 'shards/train-*.tar' --validation_files 'shards/val-*.tar'

100 epochs of SGD with mixup and cutmix, as strong as in procedure A3 of "ResNet strikes back" (arXiv 2110.00476).
Weights that begin at random need longer to settle than pretrained ones, so blocks freeze between 40 and 70 % of the
training. The learning rate is that of 1,024 images a step (eight GPUs); scale it with their number.
"""

import sys

import image_classification
from _common import imagenet_defaults, one_line_errors

DEFAULTS = {
    "output_dir": "outputs/resnet_imagenet",
    "from_scratch": "true",
    "num_train_epochs": "100",
    "per_device_train_batch_size": "128",
    "per_device_eval_batch_size": "256",
    "optim": "sgd",
    "optim_args": "momentum=0.9,nesterov=true",
    "learning_rate": "0.5",
    "weight_decay": "5e-5",
    "lr_scheduler_type": "cosine",
    "warmup_steps": "0.05",
    "min_crop": "0.08",
    "mixup_alpha": "0.1",
    "cutmix_alpha": "1.0",
    "freeze_start": "0.4",
    "freeze_end": "0.7",
}


def main(argv: list[str]) -> dict:
    return image_classification.main(imagenet_defaults(argv, "microsoft/resnet-50", DEFAULTS))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
