"""A wrapper that gives image classifiers of timm, torchvision and plain PyTorch the interface that `Trainer` needs."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput


class ImageClassifier(nn.Module):
    """A module that maps images to logits, with the inputs and outputs of Transformers' image classifiers.

    The wrapped module is the attribute `model`, and its parameters are named `model.…`, as in any module that holds
    another. `Trainer` saves and loads checkpoints of the wrapper; `wrapper.model.state_dict()` has the names that timm
    and torchvision know. Make it with `wrap_classifier`.
    """

    main_input_name = "pixel_values"
    #: `Trainer` passes it no number of items, under `torch.compile` either, where it does not see `forward`.
    accepts_loss_kwargs = False

    def __init__(self, model: nn.Module, loss: nn.Module | None = None):
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """Classifies images.

        Args:
            pixel_values: float tensor `(B, C, H, W)`.
            labels: int64 classes `(B,)`, or float probabilities `(B, K)` such as timm's `Mixup` makes. A `loss` module
                of the user's gets whatever is passed.

        Returns:
            `logits` `(B, K)`, and `loss`, a scalar, if there are labels.

        Raises:
            TypeError: if the wrapped module answers with anything but one tensor, for example with the logits of
                auxiliary heads beside its own.
            ValueError: if its answer has not the shape `(B, K)`, or if the labels have another shape or type than the
                default loss takes.

        Shapes: B images, C channels, H by W pixels, K classes.
        """
        logits = self.model(pixel_values)
        self._check_logits(logits, len(pixel_values))
        return ImageClassifierOutput(loss=None if labels is None else self._loss(logits, labels), logits=logits)

    def _check_logits(self, logits: Any, rows: int) -> None:
        name = type(self.model).__name__
        if not isinstance(logits, torch.Tensor):
            raise TypeError(
                f"{name} answers with {type(logits).__name__} instead of one tensor of logits, and it is not known "
                "what loss its parts should have. Switch its auxiliary heads off (torchvision: aux_logits=False when "
                "it is made, model.aux_logits = False afterwards), or wrap a module that returns the logits alone"
            )
        if logits.ndim != 2 or len(logits) != rows:
            raise ValueError(
                f"{name} answers with shape {tuple(logits.shape)} for {rows} images instead of (images, classes): "
                "give it a pooled classification head (timm: num_classes=… and no global_pool='')"
            )

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.loss is not None:
            return self.loss(logits, labels)
        soft = labels.is_floating_point()
        wanted = logits.shape if soft else logits.shape[:1]
        if labels.shape != wanted:
            raise ValueError(
                f"{labels.dtype} labels have shape {tuple(labels.shape)}, but cross entropy of logits "
                f"{tuple(logits.shape)} takes integer classes {tuple(logits.shape[:1])} or float probabilities "
                f"{tuple(logits.shape)}. For labels of another kind pass a loss: wrap_classifier(model, loss=…)"
            )
        return nn.functional.cross_entropy(logits, labels.to(logits.dtype) if soft else labels.long())

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Switches timm's activation checkpointing on, as `TrainingArguments(gradient_checkpointing=True)` asks for.

        Args:
            activation_checkpointing_kwargs: none, or `{"use_reentrant": False}`, which is what timm does.
            every_n_layers: 1; timm knows no other.
            offload: False; timm knows no other.

        Raises:
            ValueError: if the wrapped module has no `set_grad_checkpointing` (those of torchvision have none), or for
                settings that timm does not know.
        """
        name = type(self.model).__name__
        if not hasattr(self.model, "set_grad_checkpointing"):
            raise ValueError(
                f"{name} has no `set_grad_checkpointing`, which models of timm have: train it without activation "
                "checkpointing, or checkpoint within its own forward with use_reentrant=False"
            )
        asked = {**(activation_checkpointing_kwargs or {}), "every_n_layers": every_n_layers, "offload": offload}
        unknown = asked.items() - {"use_reentrant": False, "every_n_layers": 1, "offload": False}.items()
        if unknown:
            raise ValueError(f"{name} is checkpointed as timm does it, which does not know {dict(unknown)}")
        set_checkpointing: Any = self.model.set_grad_checkpointing
        set_checkpointing(True)

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """The name of `activation_checkpointing_enable` in earlier releases of Transformers."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, every_n_layers, offload)

    def gradient_checkpointing_disable(self) -> None:
        """Switches timm's activation checkpointing off."""
        set_checkpointing: Any = self.model.set_grad_checkpointing
        set_checkpointing(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether timm's activation checkpointing is on, in the module or in a part of it."""
        return any(bool(getattr(module, "grad_checkpointing", False)) for module in self.model.modules())

    @property
    def num_classes(self) -> int | None:
        """The outputs of the last linear or convolutional layer; None if the module has no such layer."""
        widths = [
            module.out_features if isinstance(module, nn.Linear) else module.out_channels
            for module in self.model.modules()
            if isinstance(module, (nn.Linear, nn.Conv2d))
        ]
        return widths[-1] if widths else None

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's description of the pretrained weights, where `timm.data.resolve_model_data_config` looks for it.

        Raises:
            AttributeError: if the wrapped module is not of timm.
        """
        description: Any = self.model.pretrained_cfg
        return description


def wrap_classifier(model: nn.Module, loss: nn.Module | None = None) -> ImageClassifier:
    """Makes a `Trainer` model of a classifier of timm or torchvision, or of any module that maps images to logits.

    ```python
    model = wrap_classifier(timm.create_model("convnext_tiny", pretrained=True, num_classes=10))
    trainer = FreezeCacheTrainer(model=model, ...)  # rows with pixel_values and labels
    trainer.train()
    torch.save(model.model.state_dict(), "weights.pt")  # timm's own names
    ```

    Args:
        model: maps images `(B, C, H, W)` to logits `(B, K)`; kept as it is, as the attribute `model`.
        loss: called with logits and labels, returns a scalar, for example `timm.loss.BinaryCrossEntropy()` or
            `torch.nn.CrossEntropyLoss(label_smoothing=0.1)`. By default cross entropy, with labels that are classes
            `(B,)` or probabilities `(B, K)`.

    Returns:
        A module with `forward(pixel_values, labels=None)`, which answers with a
        `transformers.modeling_outputs.ImageClassifierOutput`. Its parameters are named `model.…`.

    Raises:
        TypeError: if `model` or `loss` is not a module.
        ValueError: if the model takes `pixel_values` or `labels` itself.

    Shapes: B images, C channels, H by W pixels, K classes.
    """
    for name, value in (("model", model), ("loss", loss)):
        if not isinstance(value, nn.Module) and not (name == "loss" and value is None):
            raise TypeError(f"{name} must be a torch.nn.Module, not {type(value).__name__}")
    own = inspect.signature(model.forward).parameters.keys() & {"pixel_values", "labels"}
    if own:
        raise ValueError(
            f"{type(model).__name__} takes {' and '.join(sorted(own))} itself: if it computes the loss, pass it to "
            "the trainer as it is; if it is a Transformers model without a head, load its …ForImageClassification"
        )
    return ImageClassifier(model, loss)
