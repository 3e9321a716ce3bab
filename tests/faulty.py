"""The debug preset with a fault in it, for launchers that start processes of their own.

FAULT="die 1 3 kill" calls tests.faults.die(1, 3, "kill") in every rank.
"""

from __future__ import annotations

import os
from dataclasses import replace

from detr_fabric.launcher import launched
from experiments.debug import config as debug

config = replace(debug, train=replace(debug.train, log_every=1))

if "FAULT" in os.environ and launched() is not None:  # not in the launcher, which reads its presets too
    from tests import faults

    name, *args = os.environ["FAULT"].split()
    getattr(faults, name)(*[int(arg) if arg.isdigit() else arg for arg in args])
