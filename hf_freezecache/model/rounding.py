"""By how much features of the same samples may differ that were computed in other company."""

from __future__ import annotations

import torch

#: By how much a feature may differ in other company, relative to its size: what kernels for batches of other sizes
#: round otherwise, in single precision, in that of GPUs' matrix units for it (TF32), and below it.
_FINE, _TF32, _COARSE = 3e-4, 1e-2, 5e-2


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of a row of two tensors, relative to the norm of the row, or of a tenth of a mean row.

    Args:
        found, expected: `(N, ...)`, N rows.
    """
    if not len(expected):
        return 0.0
    found, expected = found.double().flatten(1), expected.double().flatten(1)
    norms = expected.norm(dim=1)
    return float(((found - expected).norm(dim=1) / norms.maximum(norms.mean() / 10).clamp_min(1e-12)).max())


def tolerance_of(dtype: torch.dtype, device: torch.device, is_autocast: bool) -> float:
    """The relative difference that rounding explains.

    Args:
        dtype: of a feature.
        device: on which it was computed.
        is_autocast: whether operations before it were cast to another type.
    """
    if dtype != torch.float32 or is_autocast:
        return _COARSE
    return _TF32 if device.type != "cpu" and _has_tf32() else _FINE


def _has_tf32() -> bool:
    """Whether products may be rounded to TF32; the older setting cannot be read where the newer one was made."""
    if hasattr(torch.backends, "fp32_precision"):
        convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # no stub
        return "tf32" in (torch.backends.cuda.matmul.fp32_precision, convolutions.fp32_precision)
    return torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
