"""Rules that say when to freeze, one in each file, behind one small interface."""

from .around import DelayedPolicy, FrozenFromStart
from .auto import AutoPolicy
from .base import ComingFreeze, FreezePolicy, Moment, ObservedBlock
from .linear import LinearPolicy
from .manual import ManualPolicy
from .none import NonePolicy
from .trial import Trial

__all__ = [
    "AutoPolicy",
    "ComingFreeze",
    "DelayedPolicy",
    "FreezePolicy",
    "FrozenFromStart",
    "LinearPolicy",
    "ManualPolicy",
    "Moment",
    "NonePolicy",
    "ObservedBlock",
    "Trial",
]
