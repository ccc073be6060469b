"""The error of a model that cannot be split as asked."""

from __future__ import annotations


class ChainError(ValueError):
    """A model cannot be split at its blocks as asked; the message names the module and the reason."""


class PaddingError(ChainError):
    """Features of texts at a cut cannot be stored without padding, as something reads what is there; a clause."""
