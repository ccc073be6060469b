"""SmartFRZ: a predictor, trained once, decides during a training which blocks have settled.

Liu et al. 2023 (ICLR, "Attention-based layer freezing"). `history` turns weights into what the predictor reads,
`predictor` is the network, `policy` asks it during a training; `recording`, `labels`, `windows`, `fitting` and
`evaluation` are the offline pipeline that makes it: `freezecache predictor`.
"""

from .policy import SmartFrzPolicy
from .predictor import FreezePredictor

__all__ = ["FreezePredictor", "SmartFrzPolicy"]
