"""The network that says from the history of a block whether it has settled."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from .history import NUM_FEATURES, SCALARS, Variant

#: Folder of the predictor that comes with the package.
SHIPPED = Path(__file__).parent / "shipped"
_FIRST_SCALAR = NUM_FEATURES - len(SCALARS)
#: What a predictor can read of a snapshot, by name, and where it is.
INPUTS = {
    "quantiles": slice(0, _FIRST_SCALAR),
    **{name: slice(place, place + 1) for place, name in enumerate(SCALARS, _FIRST_SCALAR)},
}


class FreezePredictor(nn.Module, PyTorchModelHubMixin, library_name="hf_freezecache", tags=["layer-freezing"]):
    """Attention over the last snapshots of a block, and two confidences: keep training, and freeze.

    Each snapshot becomes a query, a key and a value. The query of the last one looks for the snapshots that matter, as
    some are noisy; the sum of their values is the context that decides (SmartFRZ).

    Args:
        window: snapshots that are looked at, at most.
        width: of queries, keys, values and the context.
        variant: how weights are sampled, see `WeightSampler.take`.
        attention: False: the mean of the values takes the place of attention, to learn what that is worth.
        inputs: names of what is read of a snapshot, from `INPUTS`; None: the scalars. With the quantiles, which tell
            networks apart, predictors knew less of networks that they had not seen (benchmarks/predictor).

    Raises:
        ValueError: if there is no such input, or none at all.
    """

    def __init__(
        self,
        window: int = 8,
        width: int = 32,
        variant: Variant = "fixed",
        attention: bool = True,
        inputs: Sequence[str] | None = None,
    ):
        super().__init__()
        self.window, self.width, self.variant, self.attention = window, width, variant, attention
        places = _places(SCALARS if inputs is None else inputs)
        self.query, self.key, self.value = (_encoder(len(places), width) for _ in range(3))
        self.head = nn.Sequential(nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, 2))
        self.register_buffer("places", torch.tensor(places), persistent=False)
        self.places: torch.Tensor

    def forward(self, histories: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Logits `(B, 2)`: keep and freeze.

        Args:
            histories: `(B, W, NUM_FEATURES)`, the last snapshot of each history at the end; before it, whatever.
            lengths: `(B,)`: snapshots of each that count.

        Shapes: B blocks, W snapshots.
        """
        inputs = histories[:, :, self.places]
        query, keys, values = self.query(inputs[:, -1]), self.key(inputs), self.value(inputs)
        scores = (keys @ query[:, :, None])[:, :, 0] / self.width**0.5
        if not self.attention:
            scores = torch.zeros_like(scores)
        places = torch.arange(inputs.shape[1], device=inputs.device)
        scores = scores.masked_fill(places < inputs.shape[1] - lengths[:, None], float("-inf"))
        context = (scores.softmax(1)[:, :, None] * values).sum(1)
        return self.head(context)

    @torch.no_grad()
    def confidence(self, histories: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Probability `(B,)` that a block has settled; see `forward`."""
        return self(histories, lengths).softmax(1)[:, 1]


def _places(inputs: Sequence[str]) -> list[int]:
    unknown = [name for name in inputs if name not in INPUTS]
    if unknown or not inputs:
        raise ValueError(f"inputs={list(inputs)!r}: one or more of {', '.join(INPUTS)}.")
    return [place for name in inputs for place in range(NUM_FEATURES)[INPUTS[name]]]


def _encoder(inputs: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width))


@functools.lru_cache(maxsize=4)
def load_predictor(source: str | None = None) -> FreezePredictor:
    """A predictor, ready to decide: on the CPU, in eval mode.

    Args:
        source: folder or id on the Hub; None: the one that comes with the package.

    Raises:
        FileNotFoundError: if that one is missing.
    """
    if source is None and not (SHIPPED / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"policy='smartfrz' needs a predictor, and the one of the package is not in {SHIPPED}: install the "
            "package again, or name another, predictor='<folder or id on the Hub>'."
        )
    with contextlib.redirect_stdout(io.StringIO()):  # the Hub's library prints where it reads from
        return FreezePredictor.from_pretrained(str(SHIPPED) if source is None else source).eval()
