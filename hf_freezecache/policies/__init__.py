"""Rules that say when to freeze, one in each file, behind one small interface."""

from .base import FreezePolicy, Moment, ObservedBlock
from .linear import LinearPolicy
from .manual import ManualPolicy
from .none import NonePolicy

__all__ = ["FreezePolicy", "LinearPolicy", "ManualPolicy", "Moment", "NonePolicy", "ObservedBlock"]
