"""Rules that say when to freeze, one in each file, behind one small interface."""

from .around import DelayedPolicy, FrozenFromStart
from .base import ComingFreeze, FreezePolicy, Moment, ObservedBlock
from .linear import LinearPolicy
from .manual import ManualPolicy
from .none import NonePolicy

__all__ = [
    "ComingFreeze",
    "DelayedPolicy",
    "FreezePolicy",
    "FrozenFromStart",
    "LinearPolicy",
    "ManualPolicy",
    "Moment",
    "NonePolicy",
    "ObservedBlock",
]
