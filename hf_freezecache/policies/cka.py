"""Linear centered kernel alignment: how alike two representations of the same samples are."""

from __future__ import annotations

import torch


def gram(features: torch.Tensor) -> torch.Tensor:
    """Inner products of samples: all that linear CKA needs of a representation.

    Args:
        features: `(N, ...)`, flattened here; of any float type.

    Returns:
        float32 `(N, N)`.

    Shapes: N samples.
    """
    flat = features.detach().reshape(len(features), -1).float()
    flat = flat - flat.mean(0)  # CKA is the same, and small differences beside a large mean are not rounded away
    return flat @ flat.T


def cka(first: torch.Tensor, second: torch.Tensor) -> float:
    """Linear CKA of two representations by their Gram matrices (Kornblith et al. 2019, arXiv 1905.00414).

    Args:
        first: inner products `(N, N)` of one representation, as `gram` computes them.
        second: of the other, over the same samples in the same order.

    Returns:
        From 0 to 1; 1 if they differ by a rotation, a factor and an offset alone; NaN where one does not tell samples
        apart.

    Shapes: N samples.
    """
    first, second = _centered(first), _centered(second)
    return float((first * second).sum() / (first.norm() * second.norm()))


def _centered(matrix: torch.Tensor) -> torch.Tensor:
    matrix = matrix.double()
    return matrix - matrix.mean(0) - matrix.mean(1, keepdim=True) + matrix.mean()


def unbiased_hsic(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The unbiased estimator of the Hilbert-Schmidt independence criterion (Song et al. 2012, eq. 5).

    Args:
        first: inner products `(N, N)` of one representation, N at least 4.
        second: of the other.

    Raises:
        ValueError: if there are fewer than 4 samples.

    Shapes: N samples.
    """
    n = len(first)
    if n < 4:
        raise ValueError(f"the unbiased estimator needs at least 4 samples in a batch, and got {n}.")
    first, second = (matrix.double() - torch.diag(matrix.double().diagonal()) for matrix in (first, second))
    means = first.sum() * second.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * first.sum(0) @ second.sum(0)
    return ((first * second).sum() + means) / (n * (n - 3))


class MinibatchCKA:
    """Linear CKA over many samples, batch by batch, without the bias of small batches.

    Averages the unbiased criterion over batches (Nguyen et al. 2020, arXiv 2010.15327): the result does not depend on
    the size of the batches but by chance.
    """

    def __init__(self):
        self._sums = torch.zeros(3, dtype=torch.float64)

    def update(self, first: torch.Tensor, second: torch.Tensor) -> None:
        """Adds a batch.

        Args:
            first: features `(N, ...)` of one model, N at least 4.
            second: features `(N, ...)` of the other, of the same samples.

        Shapes: N samples.
        """
        one, other = gram(first).cpu(), gram(second).cpu()
        self._sums += torch.stack([unbiased_hsic(one, other), unbiased_hsic(one, one), unbiased_hsic(other, other)])

    def compute(self) -> float:
        """CKA over all batches so far, at most about 1; NaN before the first."""
        return float(self._sums[0] / (self._sums[1] * self._sums[2]).sqrt())
