"""Ways to store the vectors of tokens: a codec for all, or some tokens or channels kept in more bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hf_freezecache import make_codec
from hf_freezecache.model.layout import FeatureLayout

from .hidden_states import END, FIRST, STOP, Case

_FP16_BITS = 16


@dataclass(frozen=True)
class Scheme:
    """What stores a token.

    Args:
        codec: of every token and channel that nothing below names.
        kinds: kinds of tokens that are kept apart.
        kept_as: the codec of these tokens.
        channels: number of channels kept in fp16, those of the largest magnitude.
        massive: channels are kept in fp16 whose values beside the largest the codec could not tell apart: where a
            step of 8 bits over all values is wider than the bulk of the values is spread.
        outliers: share of the tokens kept in fp16, those farthest from the median; a bit a token says which.
        normed: tokens are divided by their root mean square, which is kept in fp16.
    """

    codec: str
    kinds: tuple[int, ...] = ()
    kept_as: str = "fp16"
    channels: int = 0
    massive: bool = False
    outliers: float = 0.0
    normed: bool = False

    def run(self, case: Case) -> tuple[torch.Tensor, float]:
        """Fits on the case's fitting texts, then encodes and decodes its test texts.

        Returns:
            The decoded vectors, `(N, C)`, and the bits a value, of all that is stored.
        """
        fit, test, channels = case.fit_vectors, case.test_vectors, case.layout.channels
        apart_fit, apart = (torch.isin(v.kinds, torch.tensor(self.kinds, dtype=torch.long)) for v in (fit, test))
        decode = self._body(case, fit.values[~apart_fit])
        decoded = torch.empty_like(test.values)
        decoded[~apart], bits = decode(test.values[~apart])
        total = bits * float((~apart).sum())
        if apart.any():
            codec = make_codec(self.kept_as, case.layout).fit(fit.values[apart_fit])
            decoded[apart] = codec.decode(codec.encode(test.values[apart]))
            total += codec.bits_per_value * channels * float(apart.sum())
        return decoded, total / test.values.numel()

    def _body(self, case: Case, fit: torch.Tensor) -> Callable[[torch.Tensor], tuple[torch.Tensor, float]]:
        """A function that encodes and decodes vectors, and says how many bits one of them takes."""
        channels = fit.shape[1]
        norms = fit.square().mean(1, keepdim=True).sqrt() if self.normed else torch.ones(len(fit), 1)
        scaled = fit / norms
        rest = torch.ones(channels, dtype=torch.bool)
        rest[scaled.abs().amax(0).argsort(descending=True)[: self.channels]] = False
        if self.massive:
            massive = massive_channels(scaled)
            rest &= ~massive | massive.all()  # some channel must be left for the codec
        far, limit = _distance(scaled), torch.inf
        if self.outliers:
            limit = float(far(scaled).quantile(1 - self.outliers))
        codec = make_codec(self.codec, FeatureLayout((int(rest.sum()),), None, 0, torch.float32))
        codec.fit(scaled[far(scaled) <= limit][:, rest], weights=case.weights[rest] if codec.uses_weights else None)

        def decode(values: torch.Tensor) -> tuple[torch.Tensor, float]:
            scale = values.square().mean(1, keepdim=True).sqrt().half().float() if self.normed else 1.0
            part = values / scale
            apart = far(part) > limit
            decoded = values.half().float()
            whole = decoded[apart]
            decoded[:, rest] = codec.decode(codec.encode(part[:, rest])) * scale
            decoded[apart] = whole
            bits = 8.0 * codec.row_bytes + _FP16_BITS * (int((~rest).sum()) + self.normed)
            share = float(apart.float().mean())
            return decoded, (1 - share) * bits + share * _FP16_BITS * channels + (self.outliers > 0)

        return decode


def massive_channels(values: torch.Tensor) -> torch.Tensor:
    """Channels in which a step of 8 bits is wider than the bulk of the values is spread, bool `(C,)`."""
    spread = values.quantile(0.84, dim=0) - values.quantile(0.16, dim=0)  # two standard deviations of a Gaussian
    return (values.amax(0) - values.amin(0)) / 255 > spread / 2


def _distance(fit: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """How far tokens are from the median, in the channels' median deviations: a function of `(N, C)` to `(N,)`."""
    centre = fit.median(0).values
    deviation = (fit - centre).abs().median(0).values.clamp(min=1e-12)
    return lambda values: ((values - centre) / deviation).square().mean(1).sqrt()


PLAIN = "fp32 fp16 int8 int4 int3 int2 mixed@8 mixed@6 mixed@5 mixed@4 mixed@3 mixed@2.5 mixed@2".split()
_VARIED = "int4 int3 int2 mixed@3".split()


def make_schemes() -> dict[str, Scheme]:
    """All ways that are measured, by name."""
    schemes = {codec: Scheme(codec) for codec in PLAIN}
    for codec in _VARIED:
        schemes[f"{codec}, first fp16"] = Scheme(codec, (FIRST,))
        schemes[f"{codec}, first int8"] = Scheme(codec, (FIRST,), "int8")
        schemes[f"{codec}, first and end fp16"] = Scheme(codec, (FIRST, END))
        schemes[f"{codec}, first and end int8"] = Scheme(codec, (FIRST, END), "int8")
        for count in (1, 4):
            schemes[f"{codec}, {count} channels fp16"] = Scheme(codec, channels=count)
        schemes[f"{codec}, massive channels fp16"] = Scheme(codec, massive=True)
        for share in (0.01, 0.03):
            schemes[f"{codec}, {share:.0%} of tokens fp16"] = Scheme(codec, outliers=share)
        schemes[f"{codec}, normed"] = Scheme(codec, normed=True)
    for codec in ("int4", "int3"):
        schemes[f"{codec}, first, end and stops int8"] = Scheme(codec, (FIRST, END, STOP), "int8")
        schemes[f"{codec}, first int8, normed"] = Scheme(codec, (FIRST,), "int8", normed=True)
    return schemes
