"""The range in which a channel is quantized: values outside it are clipped where that lowers the squared error."""

from collections.abc import Iterable, Iterator, Sequence

import torch

# Enough values to know a channel's squared error within a few per cent, few enough for thousands of channels a second.
_FIT_VALUES = 4096
# Half of them where the error at every number of bits is wanted.
_RATE_VALUES = 2048
# From 5 bits on, rare values beyond the range are most of the error: it takes more values to see them.
_FINE_VALUES = 16384
# Values in flight while fitting: what stays in a core's cache is several times faster.
_FIT_CHUNK = 1 << 17
# Clip ranges tried, in standard deviations, besides the full range. A Gaussian wants about 1.5 at 2 bits and 4 at 8.
_CLIP_SIGMAS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 4.0, 4.5, 5.0, 6.0, 8.0, 11.0, 16.0)
# More bits than these want wide ranges only.
_COARSE_BITS, _WIDE_SIGMAS = 4, (3.0, 4.0, 5.0, 6.0, 8.0, 11.0, 16.0)
# Twice this is still a float32: a range this wide can be subtracted without overflow.
_WIDEST = torch.finfo(torch.float32).max / 2


def fit_ranges(values: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds per channel the range whose uniform quantization has the lowest mean squared error.

    The candidates are `mean - k * sigma .. mean + k * sigma`, cut to the channel's range, and the full range itself.
    The error is measured on some thousand values a channel, drawn with a generator of its own; the range is of all.

    Args:
        values: of any float dtype, `(C, n)`, finite.
        levels: the largest code.

    Returns:
        scale and offset, float32 `(C,)`; scale is 0 where a channel is constant.

    Shapes: C channels, n values of each.
    """
    fine = levels >= 1 << _COARSE_BITS
    samples = _samples(values, _FINE_VALUES if fine else _FIT_VALUES)
    _, scale, offset = _joined(part.fit(levels, _WIDE_SIGMAS if fine else _CLIP_SIGMAS) for part in samples)
    return scale, offset


def fit_rates(values: torch.Tensor, most_bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What every number of bits makes of a channel, as `fit_ranges` finds it; without a bit it is its mean.

    Args:
        values: of any float dtype, `(C, n)`, finite.
        most_bits: of a code.

    Returns:
        The root of the mean squared error, scale and offset, float32 `(C, most_bits + 1)`.

    Shapes: C channels, n values of each.
    """
    coarse, fine = range(1, _COARSE_BITS + 1), range(_COARSE_BITS + 1, most_bits + 1)
    few = _joined(
        _stacked([part.fit_mean(), *(part.fit((1 << bits) - 1, _CLIP_SIGMAS) for bits in coarse)])
        for part in _samples(values, _RATE_VALUES)
    )
    many = _joined(
        _stacked([part.fit((1 << bits) - 1, _WIDE_SIGMAS) for bits in fine]) for part in _samples(values, _FINE_VALUES)
    )
    error, scale, offset = (torch.cat(tables, dim=1) for tables in zip(few, many, strict=True))
    return error, scale, offset


def _stacked(fits: list[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
    """Fits of some channels at several rates, as tables `(C, rates)`."""
    return [torch.stack(column, dim=1) for column in zip(*fits, strict=True)]


def _joined(parts: Iterable[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """Tables of some channels each, as tables of all."""
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _samples(values: torch.Tensor, count: int) -> "Iterator[_Sample]":
    """The channels in parts that stay in a core's cache, `count` values of each."""
    low, high = (edge.double().clamp(-_WIDEST, _WIDEST) for edge in values.aminmax(dim=1))
    if values.shape[1] > count:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(values.shape[1], (count,), generator=generator)
        values = values[:, drawn.to(values.device)]
    chunk = max(1, _FIT_CHUNK // values.shape[1])
    for part in zip(values.split(chunk), low.split(chunk), high.split(chunk), strict=True):
        yield _Sample(*part)


class _Sample:
    """Some channels in standard deviations, where float32 is precise enough, whatever a channel's mean and size.

    Args:
        values: `(C, n)`.
        low: float64 `(C,)`, the smallest value, also of those that were not drawn.
        high: float64 `(C,)`, the largest one.
    """

    def __init__(self, values: torch.Tensor, low: torch.Tensor, high: torch.Tensor):
        values = values.double().clamp_(low[:, None], high[:, None])
        sigma, self.mean = torch.std_mean(values, dim=1, correction=0)
        self.low, self.high = low, high
        self.sigma = torch.where(sigma > 0, sigma, 1.0)
        self.z = values.sub_(self.mean[:, None]).div_(self.sigma[:, None]).float()
        self._work = torch.empty_like(self.z)

    def fit(self, levels: int, clips: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns root mean squared error, scale and offset of the best candidate, float32 `(C,)`."""
        low, high, error = self._clip(levels, clips)
        scale = ((high - low) / levels).float()
        # A range too small for its inverse to be a float32 is a constant.
        constant = (self.low == self.high) | ~(1 / scale).isfinite()
        error = (error.double() / self.z.shape[1]).sqrt() * self.sigma
        return (
            torch.where(constant, 0.0, error).clamp(max=_WIDEST).float(),
            torch.where(constant, 0.0, scale),
            torch.where(constant, self.low, low).float(),
        )

    def fit_mean(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns root mean squared error, scale and offset, float32 `(C,)`, of a channel that is its mean."""
        constant = self.low == self.high
        error = torch.where(constant, 0.0, self.sigma).clamp(max=_WIDEST).float()
        return error, torch.zeros_like(error), torch.where(constant, self.low, self.mean).float()

    def _clip(self, levels: int, clips: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the best candidate range, low and high, float64 `(C,)`, and its sum of squared errors of z."""
        low, high, mean, sigma = self.low, self.high, self.mean, self.sigma
        z_low, z_high = (low - mean) / sigma, (high - mean) / sigma
        best_low, best_high = low, high
        best_error = _squared_error(self.z, z_low, z_high, levels, self._work)
        for k in clips:
            clip_low, clip_high = z_low.clamp(min=-k), z_high.clamp(max=k)
            error = _squared_error(self.z, clip_low, clip_high, levels, self._work)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_low = torch.where(better, torch.maximum(mean + sigma * clip_low, low), best_low)
            best_high = torch.where(better, torch.minimum(mean + sigma * clip_high, high), best_high)
        return best_low, best_high, best_error


def _squared_error(
    z: torch.Tensor, low: torch.Tensor, high: torch.Tensor, levels: int, work: torch.Tensor
) -> torch.Tensor:
    """Returns each row's sum of squared errors when quantized in `low .. high`; `work` is overwritten."""
    step = ((high - low) / levels).clamp(min=1e-30).float()
    code = (z - low.float()[:, None]).div_(step[:, None])
    torch.round(code, out=work).clamp_(0, levels).sub_(code)
    # Next to a far outlier sigma can be so small that the full range overflows: no candidate, then.
    return torch.linalg.vector_norm(work, dim=1).mul_(step).square_().nan_to_num_(nan=torch.inf, posinf=torch.inf)
