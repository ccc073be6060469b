"""What must hold before a zeroth-order training begins."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainingArguments

from ..model.freshness import is_untrained
from ..policies import FreezePolicy

if TYPE_CHECKING:
    from ..config import FreezeCacheConfig

#: Of accelerate's kinds of distributed training, those in which every process holds the whole model.
_WHOLE = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_MLU", "MULTI_XPU", "MULTI_HPU")


def check_trainer(trainer: Any) -> None:
    """Checks the settings of a trainer.

    Args:
        trainer: a `Trainer`, its accelerator set up.

    Raises:
        ValueError: if they do not go with zeroth-order training; the message says what to do.
    """
    args, accelerator = trainer.args, trainer.accelerator
    kind = getattr(accelerator.distributed_type, "value", accelerator.distributed_type)
    if kind not in _WHOLE or accelerator.parallelism_config is not None:
        what = kind if kind not in _WHOLE else "a `parallelism_config`"
        raise ValueError(
            f"zeroth-order training does not work with {what}: every process moves all weights in place. Use DDP "
            "(accelerate launch) or one process; without gradients and optimizer state a model needs the memory of "
            "inference only."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"zeroth-order training does not work on {args.n_gpu} GPUs in one process, as DataParallel copies the "
            "weights: use `accelerate launch`, or let CUDA_VISIBLE_DEVICES name one."
        )
    if accelerator.scaler is not None:
        raise ValueError(
            "zeroth-order training has no gradients that a GradScaler could scale: use bf16=True in place of "
            "fp16=True."
        )
    if args.neftune_noise_alpha is not None:
        raise ValueError(
            "NEFTune draws its noise in train mode, and zeroth-order training takes its losses in eval mode: leave "
            "out neftune_noise_alpha."
        )
    default = next(each.default for each in fields(TrainingArguments) if each.name == "optim")
    if args.optim != getattr(TrainingArguments, "default_optim", default):
        raise ValueError(f"a zeroth-order training has its own optimizer: leave out optim={str(args.optim)!r}.")
    if trainer.optimizer is None and trainer.optimizer_cls_and_kwargs is not None:
        found = trainer.optimizer_cls_and_kwargs[0]
        if not found.__module__.startswith(__package__):
            raise ValueError(
                f"a zeroth-order training has its own optimizer: leave out {found.__name__} in "
                "`optimizer_cls_and_kwargs`."
            )


def why_hard(model: nn.Module) -> str | None:
    """Says that a model is hard to train without gradients; None if it may not be."""
    if not is_untrained(model):
        return None
    return (
        f"The weights of {type(model).__name__} are those of an initialization: zeroth-order training is for models "
        "that were trained before, and needs very many steps otherwise."
    )


def check_freezing(policy: FreezePolicy, config: FreezeCacheConfig) -> None:
    """Checks that what freezes blocks asks for no gradients.

    Raises:
        ValueError: if it does; the message says what to do.
    """
    if "gradients" in policy.observes:
        raise ValueError(
            f"{type(policy).__name__} looks at gradients, and zeroth-order training has none: take policy='manual' "
            "or 'linear'."
        )
    if policy.trial_cut(16):
        raise ValueError(
            f"{type(policy).__name__} tries freezing in a few steps along gradients, and zeroth-order training has "
            "none: take policy='manual' or 'linear'."
        )
    if config.changes_learning_rates:
        raise ValueError(
            "learning rates of blocks (`anneal`, `layer_decay`) do not go with zeroth-order training, whose step "
            "along a direction moves all blocks: leave them out."
        )
