"""Ends a run that hangs, and says which rank did not come.

`position` is where a rank is and `whereabouts` what it tells the others through the `board`; `verdict` finds who holds
up the run, `watchdog` acts on it, and `reaper` ends a rank that is stopped.
"""

from ds_remoe.training.watchdog.position import Limits, Position
from ds_remoe.training.watchdog.watchdog import HUNG, Watchdog

__all__ = ["HUNG", "Limits", "Position", "Watchdog"]
