"""Of what a head is saved: a model, or the model of a trainer with what it knows of the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn
from transformers import Trainer

from ..config import FreezeCacheConfig
from ..model.chain import BlockChain
from ..rng import preserve_rng
from .errors import HeadError
from .tensors import check_plain


@runtime_checkable
class FreezingTrainer(Protocol):
    """What a `FreezeCacheTrainer` tells of a training."""

    @property
    def freeze_settings(self) -> FreezeCacheConfig: ...

    def freeze_status(self) -> Any: ...

    def freeze_cache_report(self) -> Any: ...

    def find_chain(self) -> BlockChain: ...


@dataclass(frozen=True)
class Subject:
    """A model and where it is cut.

    Args:
        chain: its blocks.
        cut: number of blocks in front of the head.
        trained_from: number of blocks that no step of the training has changed; None if that is not known.
        processor: image processor or tokenizer; None if there is none.
        trainer: that has trained it; None if it is not known.
    """

    chain: BlockChain
    cut: int
    trained_from: int | None = None
    processor: Any = None
    trainer: Any = None

    @property
    def model(self) -> nn.Module:
        """The model, not wrapped."""
        return self.chain.model


def subject_of(
    trainer_or_model: Any,
    cut: int | None,
    blocks: Sequence[str] | None = None,
    probe: Mapping[str, Any] | None = None,
    processor: Any = None,
) -> Subject:
    """Finds the model, its blocks and its cut.

    Args:
        trainer_or_model: a `Trainer`, or a model.
        cut: number of blocks in front of the head; None: that of the training.
        blocks: their names, where they are to be found otherwise.
        probe: a small batch of inputs, where the model has to be run for them.
        processor: image processor or tokenizer; None: that of the trainer.

    Raises:
        HeadError: if there is no cut, the model is in several pieces, or its tensors are not plain ones.
        TypeError: if it is neither.
        ChainError: if the model has no such blocks, or cannot be cut there.
    """
    trainer = trainer_or_model if isinstance(trainer_or_model, Trainer) else None
    if trainer is None and not isinstance(trainer_or_model, nn.Module):
        raise TypeError(f"pass a trainer or a model, not {type(trainer_or_model).__name__}.")
    if trainer is not None and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise HeadError("FSDP and DeepSpeed keep a model in pieces: save the whole model (trainer.save_model).")
    model: Any = trainer_or_model if trainer is None else trainer.accelerator.unwrap_model(trainer.model)
    model = getattr(model, "_orig_mod", model)  # of what `torch.compile(model)` returns
    check_plain(model)
    freezing = trainer if isinstance(trainer, FreezingTrainer) else None
    if cut is None:
        cut = freezing.freeze_status().cut if freezing is not None else 0
        if not cut:
            told = "nothing was frozen in this training" if freezing is not None else "a model does not tell its cut"
            raise HeadError(f"{told}: say how many blocks come before the head, cut=….")
    if freezing is not None and blocks is None and probe is None:
        chain = freezing.find_chain()
    else:
        with preserve_rng():
            chain = BlockChain.from_model(model, blocks, probe)
            chain.own_trace()  # which parameters outside the blocks run before the cut is seen in a run only
    if isinstance(cut, bool) or not isinstance(cut, int) or not 1 <= cut <= len(chain):
        raise HeadError(f"cut={cut!r}: {type(chain.model).__name__} has {len(chain)} blocks, a cut is from 1 to that.")
    if processor is None and trainer is not None:
        processor = trainer.processing_class
    return Subject(chain, cut, None if freezing is None else _trained_from(freezing), processor, trainer)


def _trained_from(trainer: Any) -> int | None:
    """How many blocks no step has changed; None if not all steps are known."""
    phases = [phase for phase in trainer.freeze_cache_report().phases if phase.mode in ("live", "replay")]
    steps = sum(phase.steps for phase in phases)
    if not steps or steps != trainer.state.global_step:
        return None
    return min(phase.cut for phase in phases if phase.steps)
