"""Rules that say when to freeze, one in each file, behind one small interface."""

from .auto import AutoPolicy
from .base import FreezePolicy, Moment, ObservedBlock
from .linear import LinearPolicy
from .manual import ManualPolicy
from .none import NonePolicy
from .trial import Trial

__all__ = [
    "AutoPolicy",
    "FreezePolicy",
    "LinearPolicy",
    "ManualPolicy",
    "Moment",
    "NonePolicy",
    "ObservedBlock",
    "Trial",
]
