"""Mixup, cutmix and noise, on the images of live epochs and on the features of replay epochs."""

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

    Live epochs mix images, replay epochs mix the features at the cut, with the same draws in the same order from
    torch's CPU generator. Each row is mixed with the row before it. If both are on, each batch gets one of them with
    probability 1/2, as with `v2.RandomChoice([CutMix, MixUp])`.

    Mixup mixes all values of a feature with the same weights. CutMix pastes a box of positions. Special tokens (CLS,
    registers) have no position: they are mixed with the box's share of the area as weight, as the labels are. On a
    coarse grid the box is coarse too: torchvision rounds its half sides down to whole positions, so that small boxes
    vanish (on a 7x7 grid those with sides under 2/7). The weights of the labels are those of the box after rounding.

    Args:
        mixup_alpha: parameter of the Beta distribution from which mixup draws; 0 turns mixup off.
        cutmix_alpha: parameter of the Beta distribution from which cutmix draws; 0 turns cutmix off.
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
        # torchvision cannot draw with an integer alpha. Cutmix uses the arithmetic of mixup for special tokens, but
        # never draws with it.
        self._mixup = v2.MixUp(alpha=float(mixup_alpha) or 1.0, num_classes=num_classes)
        self._cutmix = v2.CutMix(alpha=float(cutmix_alpha), num_classes=num_classes) if cutmix_alpha else None
        self._num_classes = num_classes
        self._both = mixup_alpha > 0 and cutmix_alpha > 0

    def check(self, layout: FeatureLayout) -> None:
        """Checks that features of a layout can be mixed.

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
        """Mixes a batch. Does not change the given one.

        Args:
            inputs: model inputs by name, with int64 labels `(B,)`.
            main_input: name of the input that is mixed: floating point images `(B, 3, H, W)`, or features
                `(B, *layout.shape)` if a layout is given.
            label_name: name of the labels.
            layout: layout of the features; None for images.

        Returns:
            The inputs with the main input mixed, in its dtype, and float32 labels `(B, K)` whose rows sum to 1; the
            other inputs are unchanged.

        Raises:
            ValueError: if labels or main input cannot be mixed, or cutmix is on and the features have no grid.

        Shapes: B samples, H height, W width, K classes.
        """
        labels = _class_labels(inputs, label_name)
        values = inputs[main_input]
        _check_values(values, len(labels), main_input, layout)
        if layout is not None:
            self.check(layout)
        batch = {"labels": labels, "batch_size": len(labels)}
        cutmix = self._choose_cutmix()
        if cutmix is not None:
            mixed, params = self._cut(cutmix, values, layout, batch)
            labels = cutmix.transform(labels, params)
        else:
            params = batch | self._mixup.make_params([values])
            mixed = self._blend(values, params["lam"])
            labels = self._mixup.transform(labels, params)
        return {**inputs, main_input: mixed, label_name: labels}

    def unmixed(self, inputs: Mapping[str, Any], label_name: str = "labels") -> dict[str, Any]:
        """The batch as it is, with labels of the form that mixed ones have: float32 `(B, K)`."""
        labels = _class_labels(inputs, label_name)
        return {**inputs, label_name: F.one_hot(labels, self._num_classes).to(torch.float32)}

    def _choose_cutmix(self) -> v2.CutMix | None:
        """Cutmix if it is this batch's turn, by the draw of `v2.RandomChoice` if both are on; None for mixup."""
        if self._both and int(torch.multinomial(torch.tensor([0.5, 0.5]), 1)) != 0:
            return None
        return self._cutmix

    def _cut(
        self, cutmix: v2.CutMix, values: torch.Tensor, layout: FeatureLayout | None, batch: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        maps = values if layout is None else to_maps(values, layout)
        params = batch | cutmix.make_params([maps])
        maps = cutmix.transform(maps, params)
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
    """Cross entropy of a model's logits with class numbers or class probabilities; a loss function for `Trainer`.

    Args:
        outputs: model outputs with `logits` `(B, K)`.
        labels: class numbers, int64 `(B,)`, or class probabilities, float `(B, K)`.
        num_items_in_batch: number of samples in all micro-batches of the optimizer step; None: B.
        label_smoothing: from 0 to 1.

    Returns:
        The sum over the samples, divided by `num_items_in_batch`: a scalar.

    Shapes: B samples, K classes.
    """
    loss = F.cross_entropy(outputs["logits"], labels, label_smoothing=label_smoothing, reduction="sum")
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def add_noise(features: torch.Tensor, sigma: float) -> torch.Tensor:
    """Adds Gaussian noise from the global generator of the features' device, from which dropout draws too.

    Args:
        features: float tensor of any shape.
        sigma: standard deviation, in units of the features.

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
            f"mixup and cutmix mix labels too, but the batch has no '{name}', only {', '.join(inputs)}: keep the "
            "labels in the batch, or set mixup_alpha and cutmix_alpha to 0."
        )
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64 or labels.ndim != 1:
        got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise ValueError(
            f"mixup and cutmix take one class number per sample, an int64 tensor (B,); '{name}' is {got}. If the "
            "labels are soft already (from a collator that mixes), remove that mixing, or set mixup_alpha and "
            "cutmix_alpha to 0."
        )
    return labels


def _check_values(values: torch.Tensor, rows: int, name: str, layout: FeatureLayout | None) -> None:
    expected = "(B, 3, H, W)" if layout is None else f"(B, {', '.join(map(str, layout.shape))})"
    fits = values.ndim == 4 if layout is None else tuple(values.shape[1:]) == layout.shape
    if not fits or len(values) != rows or not values.is_floating_point():
        raise ValueError(
            f"mixup and cutmix take '{name}' as floating point {expected} with B={rows} as the labels, got "
            f"{values.dtype} {tuple(values.shape)}."
        )
