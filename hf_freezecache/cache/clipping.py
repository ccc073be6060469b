"""The range in which a channel is quantized: values outside it are clipped where that lowers the squared error."""

import torch

# Enough values to know a channel's squared error within a few per cent, few enough for thousands of channels a second.
_FIT_VALUES = 4096
# Values in flight while fitting: what stays in a core's cache is several times faster.
_FIT_CHUNK = 1 << 17
# Clip ranges tried, in standard deviations, besides the full range. A Gaussian wants about 1.5 at 2 bits and 4 at 8.
_CLIP_SIGMAS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 4.0, 4.5, 5.0, 6.0, 8.0, 11.0, 16.0)
# Twice this is still a float32: a range this wide can be subtracted without overflow.
_WIDEST = torch.finfo(torch.float32).max / 2


def fit_ranges(values: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds per channel the range whose uniform quantization has the lowest mean squared error.

    The candidates are `mean - k * sigma .. mean + k * sigma`, cut to the channel's range, and the full range itself.
    The error is measured on at most 4096 values a channel, drawn with a generator of its own; the range is of all.

    Args:
        values: of any float dtype, `(C, n)`, finite.
        levels: the largest code.

    Returns:
        scale and offset, float32 `(C,)`; scale is 0 where a channel is constant.

    Shapes: C channels, n values of each.
    """
    low, high = (edge.double().clamp(-_WIDEST, _WIDEST) for edge in values.aminmax(dim=1))
    if values.shape[1] > _FIT_VALUES:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(values.shape[1], (_FIT_VALUES,), generator=generator)
        values = values[:, drawn.to(values.device)]
    chunk = max(1, _FIT_CHUNK // values.shape[1])
    clips = [
        _clip(part, part_low, part_high, levels)
        for part, part_low, part_high in zip(values.split(chunk), low.split(chunk), high.split(chunk), strict=True)
    ]
    clip_low, clip_high = (torch.cat(edges) for edges in zip(*clips, strict=True))
    scale = ((clip_high - clip_low) / levels).float()
    # A range too small for its inverse to be a float32 is a constant.
    constant = (low == high) | ~(1 / scale).isfinite()
    return torch.where(constant, 0.0, scale), torch.where(constant, low, clip_low).float()


def _clip(
    values: torch.Tensor, low: torch.Tensor, high: torch.Tensor, levels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the best candidate range, low and high, float64 `(C,)`; the arguments give the full range."""
    values = values.double().clamp_(low[:, None], high[:, None])
    sigma, mean = torch.std_mean(values, dim=1, correction=0)
    sigma = torch.where(sigma > 0, sigma, 1.0)
    # In standard deviations float32 is precise enough, whatever the channel's mean and size.
    z = values.sub_(mean[:, None]).div_(sigma[:, None]).float()
    z_low, z_high = (low - mean) / sigma, (high - mean) / sigma
    best_low, best_high, work = low, high, torch.empty_like(z)
    best_error = _squared_error(z, z_low, z_high, levels, work)
    for k in _CLIP_SIGMAS:
        clip_low, clip_high = z_low.clamp(min=-k), z_high.clamp(max=k)
        error = _squared_error(z, clip_low, clip_high, levels, work)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_low = torch.where(better, torch.maximum(mean + sigma * clip_low, low), best_low)
        best_high = torch.where(better, torch.minimum(mean + sigma * clip_high, high), best_high)
    return best_low, best_high


def _squared_error(
    z: torch.Tensor, low: torch.Tensor, high: torch.Tensor, levels: int, work: torch.Tensor
) -> torch.Tensor:
    """Returns each row's sum of squared errors when quantized in `low .. high`; `work` is overwritten."""
    step = ((high - low) / levels).clamp(min=1e-30).float()
    code = (z - low.float()[:, None]).div_(step[:, None])
    torch.round(code, out=work).clamp_(0, levels).sub_(code)
    # Next to a far outlier sigma can be so small that the full range overflows: no candidate, then.
    return torch.linalg.vector_norm(work, dim=1).mul_(step).square_().nan_to_num_(nan=torch.inf, posinf=torch.inf)
