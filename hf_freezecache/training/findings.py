"""What one process alone finds in the middle of an epoch, until all processes know."""

from __future__ import annotations

import torch

from ..distributed import Group


class Findings:
    """Why features are not used any more, and why a store could not be read on.

    Args:
        group: the processes.
        device: on which they communicate.

    Attributes:
        mismatch: why the features are not those of the training, as a sentence; None: nothing was found.
        lost: why the store could not be read; None: it could.
        concern_the_step: whether all processes run a step on features, or none. Else they are told after the epoch.
    """

    def __init__(self, group: Group, device: torch.device):
        self._group, self._device = group, device
        self.mismatch: str | None = None
        self.lost: str | None = None
        self.concern_the_step = False

    def before_step(self, is_live: bool) -> bool:
        """Whether some process runs a step on samples that was to be one on features; all processes ask together.

        Args:
            is_live: whether this one does.
        """
        found = is_live or self.mismatch is not None or self.lost is not None
        return self.concern_the_step and self._group.any(found, self._device)

    def share(self) -> tuple[str | None, str | None]:
        """The first mismatch and the first loss that some process has found, which are over then."""
        found = self._group.gather((self.mismatch, self.lost))
        self.mismatch = self.lost = None
        mismatches, losses = zip(*found, strict=True)
        return next(filter(None, mismatches), None), next(filter(None, losses), None)
