"""A predictor that was not trained: what it looks at is known."""

from __future__ import annotations

import torch

from hf_freezecache.smartfrz import FreezePredictor
from hf_freezecache.smartfrz.history import NUM_FEATURES, SCALARS


class ByDrift(FreezePredictor):
    """Says that a block has settled when its last step was small beside its drift."""

    def __init__(self, window: int = 8, limit: float = -1.0):
        super().__init__(window=window)
        self.limit = limit

    def forward(self, histories, lengths):
        place = NUM_FEATURES - len(SCALARS) + SCALARS.index("step_to_drift")
        value = self.limit - histories[:, -1, place]
        return torch.stack([-value, value], 1) * 20
