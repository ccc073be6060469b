"""Whether a loss has enough digits: a slope is a small difference of two losses."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: In the names of operations that make a loss, and of others that make one number of many.
_LOSSES, _REDUCTIONS = ("loss", "cross_entropy", "kl_div"), ("aten::mean", "aten::sum")


class DigitWatch(TorchDispatchMode):
    """Sees while a loss is computed whether it becomes a number of 16 bits on the way, whatever it is made of that.

    Of two losses of about 2, neighbours in bfloat16 are 1/64 apart: their differences on both sides of the weights are
    0, or many times what they should be.
    """

    def __init__(self) -> None:
        super().__init__()
        self._coarse: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        number = found[0] if isinstance(found, (tuple, list)) and found else found
        if isinstance(number, torch.Tensor) and number.dim() == 0 and _is_coarse(number):
            self._coarse.add(func.name())
        return found

    def check(self, loss: torch.Tensor) -> str | None:
        """What there is to be said of a loss that was computed while this has watched.

        Returns:
            A warning, where a number of 16 bits may be a part of the loss.

        Raises:
            ValueError: if it is the loss; the message says what to do.
        """
        if _is_coarse(loss) or any(part in name for name in self._coarse for part in _LOSSES):
            raise ValueError(
                "the loss is computed as a number of 16 bits, whose last digit is coarser than the difference of "
                "losses on both sides of the weights. Load the weights in float32 (with bf16=True the model computes "
                "in 16 bits, and the loss in 32), or give a `compute_loss_func` that takes `logits.float()`."
            )
        if any(name.startswith(_REDUCTIONS) for name in self._coarse):
            return (
                "While the loss is computed, a number of 16 bits is made of many. If it is a part of the loss, "
                "zeroth-order training cannot see small differences of it: compute it in float32."
            )
        return None


def _is_coarse(number: torch.Tensor) -> bool:
    return number.is_floating_point() and number.dtype.itemsize < 4
