"""Rules that say when to freeze, one in each file, behind one small interface."""

from .around import DelayedPolicy, FrozenFromStart
from .auto import AutoPolicy
from .autofreeze import AutoFreezePolicy
from .base import ComingFreeze, FreezePolicy, Moment, ObservedBlock
from .egeria import EgeriaPolicy
from .freezeout import FreezeOutPolicy
from .linear import LinearPolicy
from .manual import ManualPolicy
from .none import NonePolicy
from .simfreeze import SimFreezePolicy
from .trial import Choice, Trial

#: Rules that find out which blocks have settled, by name.
SETTLING = {cls.name: cls for cls in (AutoFreezePolicy, EgeriaPolicy, SimFreezePolicy)}

__all__ = [
    "SETTLING",
    "AutoFreezePolicy",
    "AutoPolicy",
    "Choice",
    "ComingFreeze",
    "DelayedPolicy",
    "EgeriaPolicy",
    "FreezeOutPolicy",
    "FreezePolicy",
    "FrozenFromStart",
    "LinearPolicy",
    "ManualPolicy",
    "Moment",
    "NonePolicy",
    "ObservedBlock",
    "SimFreezePolicy",
    "Trial",
]
