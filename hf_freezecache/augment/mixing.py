"""Mixup, cutmix and noise: on the images of live epochs, on the features of replay epochs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from ..model.layout import FeatureLayout
from .maps import put_maps, to_maps


class Mixer:
    """Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) on a training batch, by torchvision's `v2` transforms.

    In live epochs they mix images, in replay epochs the features at the cut, with the same draws in the same order
    from torch's CPU generator. Each row is mixed with the one before it. With both of them on, each batch gets one or
    the other with probability 1/2, as from `v2.RandomChoice([CutMix, MixUp])`.

    Mixup mixes every value of a feature alike. CutMix pastes a box of positions; special tokens (CLS, registers) lie
    nowhere, so they are mixed by the box's share of the area, as the labels are. On a coarse grid the box is coarse
    too: torchvision rounds its half sides down to whole positions, so that small boxes vanish (on 7x7 those whose
    sides are under 2/7). The labels follow the box that was pasted.

    Args:
        mixup_alpha: of the Beta distribution mixup draws from; 0 turns it off.
        cutmix_alpha: of the Beta distribution cutmix draws from; 0 turns it off.
        num_classes: number of classes, at least 2.

    Raises:
        ValueError: if an alpha is negative or not finite, both are 0, or there are fewer than 2 classes.
    """

    def __init__(self, mixup_alpha: float, cutmix_alpha: float, num_classes: int):
        for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
            if not 0 <= alpha < float("inf"):
                raise ValueError(f"{name} is 0 (off) or a positive number, got {alpha}")
        if not mixup_alpha and not cutmix_alpha:
            raise ValueError("nothing to mix: both mixup_alpha and cutmix_alpha are 0.")
        if num_classes < 2:
            raise ValueError(f"mixup and cutmix mix the labels of 2 classes or more, got num_classes={num_classes}")
        # torchvision cannot draw with an integer alpha. Cutmix needs the arithmetic of mixup for special tokens, but
        # never draws from it.
        self._mixup = v2.MixUp(alpha=float(mixup_alpha) or 1.0, num_classes=num_classes)
        self._cutmix = v2.CutMix(alpha=float(cutmix_alpha), num_classes=num_classes) if cutmix_alpha else None
        self._both = mixup_alpha > 0 and cutmix_alpha > 0

    def check(self, layout: FeatureLayout) -> None:
        """Says whether features of this layout can be mixed.

        Raises:
            ValueError: if cutmix is on and the features have no grid.
        """
        if self._cutmix is not None and layout.grid is None:
            raise ValueError(
                f"cutmix pastes a box of positions, and features of shape {layout.shape} have no grid of them: "
                "set cutmix_alpha to 0 and use mixup, or freeze at a cut whose feature has a grid."
            )

    def __call__(
        self,
        inputs: Mapping[str, Any],
        main_input: str,
        label_name: str = "labels",
        layout: FeatureLayout | None = None,
    ) -> dict[str, Any]:
        """Mixes a batch; the one given stays as it is.

        Args:
            inputs: the model's inputs by name, with int64 labels `(B,)`.
            main_input: name of what is mixed: images `(B, 3, H, W)` without a layout, features `(B, *shape)` with one;
                floating point.
            label_name: name of the labels.
            layout: of the features; None for images.

        Returns:
            The inputs with the main one mixed, its dtype kept, and float32 labels `(B, K)` whose rows sum to 1; the
            other inputs as they were.

        Raises:
            ValueError: if labels or main input cannot be mixed, or cutmix is on and the features have no grid.

        Shapes: B samples, H height, W width, K classes.
        """
        labels = _class_labels(inputs, label_name)
        values = inputs[main_input]
        _check_values(values, len(labels), main_input, layout)
        if layout is not None:
            self.check(layout)
        known = {"labels": labels, "batch_size": len(labels)}
        if self._draws_cutmix():
            mixing, (mixed, params) = self._cutmix, self._cut(values, layout, known)
        else:
            mixing, params = self._mixup, known | self._mixup.make_params([values])
            mixed = self._blend(values, params["lam"])
        return {**inputs, main_input: mixed, label_name: mixing.transform(labels, params)}

    def _draws_cutmix(self) -> bool:
        if not self._both:
            return self._cutmix is not None
        # The draw of `v2.RandomChoice`.
        return int(torch.multinomial(torch.tensor([0.5, 0.5]), 1)) == 0

    def _cut(
        self, values: torch.Tensor, layout: FeatureLayout | None, known: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        maps = values if layout is None else to_maps(values, layout)
        params = known | self._cutmix.make_params([maps])
        maps = self._cutmix.transform(maps, params)
        if layout is None:
            return maps, params
        mixed, special = values.clone(), layout.special_tokens
        if special:
            mixed[:, :special] = self._blend(values[:, :special], params["lam_adjusted"])
        return put_maps(mixed, maps, layout), params

    def _blend(self, values: torch.Tensor, lam: float) -> torch.Tensor:
        params = {"labels": None, "batch_size": len(values), "lam": lam}
        if values.ndim == 4:
            return self._mixup.transform(values, params)
        # torchvision wants four dimensions, whatever they mean.
        return self._mixup.transform(values.flatten(1)[:, None, None], params).view(values.shape)


def soft_cross_entropy(
    outputs: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross entropy of a model's logits for class numbers or class probabilities; a loss function of `Trainer`.

    Args:
        outputs: with `logits` `(B, K)`.
        labels: int64 `(B,)` or float `(B, K)`.
        num_items_in_batch: samples in all micro-batches of the optimizer step; None: those of this one.
        label_smoothing: from 0 to 1.

    Shapes: B samples, K classes.
    """
    loss = F.cross_entropy(outputs["logits"], labels, label_smoothing=label_smoothing, reduction="sum")
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def add_noise(features: torch.Tensor, sigma: float) -> torch.Tensor:
    """Adds Gaussian noise, drawn as dropout draws: from the global generator of the features' device.

    Args:
        features: float tensor of any shape.
        sigma: standard deviation, in the unit of the features.

    Returns:
        A new tensor of the same dtype.

    Raises:
        ValueError: if `sigma` is negative or not finite.
    """
    if not 0 <= sigma < float("inf"):
        raise ValueError(f"the standard deviation of the noise is 0 or a positive number, got {sigma}")
    return torch.add(features, torch.randn_like(features), alpha=sigma)


def _class_labels(inputs: Mapping[str, Any], name: str) -> torch.Tensor:
    labels = inputs.get(name)
    if labels is None:
        raise ValueError(
            f"mixup and cutmix mix labels too, and the batch has no '{name}', only {', '.join(inputs)}: keep the "
            "labels in the batch, or set mixup_alpha and cutmix_alpha to 0."
        )
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64 or labels.ndim != 1:
        got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise ValueError(
            f"mixup and cutmix take one class number per sample, an int64 tensor (B,); '{name}' is {got}. If the "
            "labels are soft already (a collator that mixes), take that out, or set mixup_alpha and cutmix_alpha to 0."
        )
    return labels


def _check_values(values: torch.Tensor, rows: int, name: str, layout: FeatureLayout | None) -> None:
    wanted = "(B, 3, H, W)" if layout is None else f"(B, {', '.join(map(str, layout.shape))})"
    fits = values.ndim == 4 if layout is None else tuple(values.shape[1:]) == layout.shape
    if not fits or len(values) != rows or not values.is_floating_point():
        raise ValueError(
            f"mixup and cutmix take '{name}' as floating point {wanted} with B={rows} as the labels, got "
            f"{values.dtype} {tuple(values.shape)}."
        )
