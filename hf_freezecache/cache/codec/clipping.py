"""Clip ranges: the range in which a channel is quantized. Values outside are clipped if that lowers the error."""

from collections.abc import Iterable, Iterator, Sequence

import torch

# Values per channel from which a range is fitted: they give the squared error within a few per cent, and thousands of
# channels are fitted in a second.
_FIT_VALUES = 4096
# Half as many where the error for every number of bits is measured.
_RATE_VALUES = 2048
# From 5 bits on, rare values outside the range cause most of the error: more values are needed to include some.
_FINE_VALUES = 16384
# Values that are processed at once: arrays that stay in a core's cache are several times faster.
_FIT_CHUNK = 1 << 17
# Clip ranges that are tried besides the full range, in standard deviations. The best one for a Gaussian is about 1.5
# with 2 bits and 4 with 8.
_CLIP_SIGMAS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 4.0, 4.5, 5.0, 6.0, 8.0, 11.0, 16.0)
# With more bits than these, only wide ranges are tried.
_COARSE_BITS, _WIDE_SIGMAS = 4, (3.0, 4.0, 5.0, 6.0, 8.0, 11.0, 16.0)
# Twice this is still a float32, so that the ends of a range can be subtracted without overflow.
_WIDEST = torch.finfo(torch.float32).max / 2


def fit_clip_ranges(values: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the clip range of every channel whose uniform quantization has the lowest mean squared error.

    The candidates are `mean - k * sigma .. mean + k * sigma`, limited to the smallest and largest value of the
    channel, and its full range. The error is measured on some thousand values of a channel, which a separate random
    generator selects; smallest and largest value are those of all values.

    Args:
        values: `(C, n)` of any float dtype, finite.
        levels: the largest code.

    Returns:
        Scale and offset, float32 `(C,)`; the scale of a constant channel is 0.

    Shapes: C channels, n values of each.
    """
    fine = levels >= 1 << _COARSE_BITS
    parts = _parts(values, _FINE_VALUES if fine else _FIT_VALUES)
    _, scale, offset = _joined(part.fit(levels, _WIDE_SIGMAS if fine else _CLIP_SIGMAS) for part in parts)
    return scale, offset


def fit_rates(values: torch.Tensor, most_bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Error and clip range of every channel for every number of bits; a channel with 0 bits becomes its mean.

    Args:
        values: `(C, n)` of any float dtype, finite.
        most_bits: largest number of bits of a code.

    Returns:
        Root mean squared error, scale and offset, float32 `(C, most_bits + 1)` each.

    Shapes: C channels, n values of each.
    """
    coarse, fine = range(1, _COARSE_BITS + 1), range(_COARSE_BITS + 1, most_bits + 1)
    few = _joined(
        _stacked([part.fit_mean(), *(part.fit((1 << bits) - 1, _CLIP_SIGMAS) for bits in coarse)])
        for part in _parts(values, _RATE_VALUES)
    )
    many = _joined(
        _stacked([part.fit((1 << bits) - 1, _WIDE_SIGMAS) for bits in fine]) for part in _parts(values, _FINE_VALUES)
    )
    error, scale, offset = (torch.cat(tables, dim=1) for tables in zip(few, many, strict=True))
    return error, scale, offset


def _stacked(fits: list[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
    """Stacks the fits of the same channels for several numbers of bits to tables `(C, rates)`."""
    return [torch.stack(column, dim=1) for column in zip(*fits, strict=True)]


def _joined(parts: Iterable[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """Joins the tables of parts of the channels to tables of all channels."""
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _parts(values: torch.Tensor, count: int) -> "Iterator[_ChannelPart]":
    """Splits the channels into parts that stay in a core's cache, with at most `count` values of each channel."""
    low, high = (edge.double().clamp(-_WIDEST, _WIDEST) for edge in values.aminmax(dim=1))
    if values.shape[1] > count:
        generator = torch.Generator().manual_seed(0)
        places = torch.randint(values.shape[1], (count,), generator=generator)
        values = values[:, places.to(values.device)]
    chunk = max(1, _FIT_CHUNK // values.shape[1])
    for part in zip(values.split(chunk), low.split(chunk), high.split(chunk), strict=True):
        yield _ChannelPart(*part)


class _ChannelPart:
    """Some channels, each normalized by its mean and standard deviation so that float32 is precise enough.

    Args:
        values: `(C, n)`, a selection of each channel's values.
        low: float64 `(C,)`, the smallest of all values of a channel.
        high: float64 `(C,)`, the largest of all values of a channel.

    Shapes: C channels of this part, n values of each.
    """

    def __init__(self, values: torch.Tensor, low: torch.Tensor, high: torch.Tensor):
        values = values.double().clamp_(low[:, None], high[:, None])
        sigma, self.mean = torch.std_mean(values, dim=1, correction=0)
        self.low, self.high = low, high
        self.sigma = torch.where(sigma > 0, sigma, 1.0)
        self.z = values.sub_(self.mean[:, None]).div_(self.sigma[:, None]).float()
        self._work = torch.empty_like(self.z)

    def fit(self, levels: int, clips: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Root mean squared error, scale and offset of the best candidate, float32 `(C,)`."""
        low, high, error = self._clip(levels, clips)
        scale = ((high - low) / levels).float()
        # A channel whose range is so small that its inverse is no float32 counts as constant.
        constant = (self.low == self.high) | ~(1 / scale).isfinite()
        error = (error.double() / self.z.shape[1]).sqrt() * self.sigma
        return (
            torch.where(constant, 0.0, error).clamp(max=_WIDEST).float(),
            torch.where(constant, 0.0, scale),
            torch.where(constant, self.low, low).float(),
        )

    def fit_mean(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Root mean squared error, scale and offset, float32 `(C,)`, of channels that are replaced by their means."""
        constant = self.low == self.high
        error = torch.where(constant, 0.0, self.sigma).clamp(max=_WIDEST).float()
        return error, torch.zeros_like(error), torch.where(constant, self.low, self.mean).float()

    def _clip(self, levels: int, clips: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Low and high end of the best candidate range, float64 `(C,)`, and its sum of squared errors of z."""
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
    """Sum of squared errors of each row when it is quantized in `low .. high`; overwrites `work`."""
    step = ((high - low) / levels).clamp(min=1e-30).float()
    code = (z - low.float()[:, None]).div_(step[:, None])
    torch.round(code, out=work).clamp_(0, levels).sub_(code)
    # With a far outlier, sigma can be so small that the full range overflows: then it is no candidate.
    return torch.linalg.vector_norm(work, dim=1).mul_(step).square_().nan_to_num_(nan=torch.inf, posinf=torch.inf)
