"""Lets the tests of this folder import what the unit and reference tests share."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / part) for part in ("unit", "reference")]
