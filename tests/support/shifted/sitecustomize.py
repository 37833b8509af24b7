"""On PYTHONPATH, this makes a process's clock wrong by the seconds in the file that CLOCK_FILE names."""

from __future__ import annotations

import datetime
import os
import time
from pathlib import Path

REAL, EXACT = time.time, datetime.datetime


def shift():
    try:
        return float(Path(os.environ["CLOCK_FILE"]).read_text())
    except (OSError, ValueError, KeyError):
        return 0.0


class Any(type):
    """Moments that were made before, or by others, are moments too."""

    def __instancecheck__(cls, value):
        return isinstance(value, EXACT)


class Shifted(EXACT, metaclass=Any):
    @classmethod
    def now(cls, tz=None):
        return EXACT.fromtimestamp(time.time(), tz)


time.time = lambda: REAL() + shift()
datetime.datetime = Shifted
