"""Sensitivity of the logits to an error in each channel of the feature at a cut (diagonal Fisher information)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..cache.codec.haar import to_bands
from ..model.chain import BlockChain
from ..model.layout import to_positions
from ..model.modes import eval_mode
from ..model.structure import first_tensor
from ..model.tokens import token_mask
from ..rng import preserve_rng


def fisher_weights(
    chain: BlockChain, cut: int, batches: Iterable[Mapping[str, Any]], seed: int, bands: bool = False
) -> torch.Tensor:
    """Diagonal of the Fisher information of the feature at a cut, by channels (Martens 2020, arXiv 1412.1193).

    It is the mean squared gradient of the loss of labels that the model itself would give; half of it, times the
    square of an error, is to second order the KL divergence of the logits that the error makes.

    No labels are drawn: with `p` the model's probabilities and `z` normal noise, the gradient of
    `<logits, sqrt(p) z - p <sqrt(p), z>>` has the same second moment as the loss's, `diag(p) - p p^T` in the logits,
    and far less spread where the model is sure. For a regression (`config.problem_type`, or a single logit) it is the
    gradient of `<answer, z>`. Gradients, buffers, modes and random generators are left as they were.

    Args:
        chain: the model.
        cut: frozen blocks, 1 to `len(chain)`.
        batches: model inputs by name, on the model's device.
        seed: of the noise.
        bands: return the weights of the bands of feature maps (`codec.haar`), which `mixed` uses, where there are any.

    Returns:
        float32 `(C,)`, mean over samples and positions, special tokens excluded; of bands `(4, C)`.

    Raises:
        ValueError: if there are no batches, or a gradient is not finite.

    Shapes: C channels.
    """
    total, samples, generator = torch.zeros(()), 0, torch.Generator().manual_seed(seed)
    with preserve_rng(), eval_mode(chain.model):
        for inputs in batches:
            features = chain.prefix(inputs, cut)
            layout = chain.stored_layout(cut)
            gradient = _gradient(chain, cut, inputs, features, generator)
            # The transform is orthonormal: a channel's mean square is that of its bands.
            if chain.padding.has_sizes(cut):
                gradient = to_positions(gradient).flatten(0, 1)
            elif layout.is_token:
                mask = token_mask(inputs, chain.main_input)
                gradient = gradient if mask is None else gradient[mask.flatten(1)]
            squares = to_bands(layout.body(gradient), layout).double().square().mean(3)
            total = total + (squares if bands else squares.mean(1, keepdim=True)).sum(0).cpu()
            samples += len(gradient)
    if not samples:
        raise ValueError("the Fisher information needs at least one batch")
    weights = (total / samples).float()
    if not weights.isfinite().all():
        raise ValueError(f"a gradient at cut {cut} is not finite; use the codec 'int4', which needs none")
    return weights if len(weights) > 1 else weights[0]


def _gradient(
    chain: BlockChain, cut: int, inputs: Mapping[str, Any], features: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Returns one draw of the gradient, in the features' shape; parameters get none."""
    features = features.detach().requires_grad_(True)
    own = {name: value for name, value in inputs.items() if name != "labels"}
    own[chain.main_input] = main_input = chain.input_of_replay(features, inputs)
    with torch.enable_grad(), chain.replay(cut, features, main_input):
        output = chain.model(**own)
        answer = output["logits"] if isinstance(output, Mapping) and "logits" in output else output
        answer = first_tensor(answer).float()
        noise = torch.randn(answer.shape, generator=generator).to(answer.device)
        problem = getattr(getattr(chain.model, "config", None), "problem_type", None)
        if problem == "regression" or answer.ndim == 1 or answer.shape[-1] == 1:
            direction = noise
        else:
            root = answer.detach().softmax(-1).sqrt()
            direction = root * noise - root.square() * (root * noise).sum(-1, keepdim=True)
        (gradient,) = torch.autograd.grad((answer * direction).sum(), features)
    return gradient.float()
