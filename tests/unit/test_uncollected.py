"""When Python looks for garbage on the way to a first round, and through what."""

from __future__ import annotations

import subprocess
import sys

import pytest

CYCLE = """
import gc, weakref
from fedpeft.uncollected import set_apart, uncollected
class Loop: pass
def leave_garbage():
    loop = Loop()
    loop.itself = loop
    return weakref.ref(loop)
"""


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("with uncollected():\n    print(gc.isenabled())\nprint(gc.isenabled())", "False\nTrue"),
        ("gc.disable()\nwith uncollected():\n    pass\nprint(gc.isenabled())", "False"),
        ("with uncollected():\n    pass\nprint(gc.get_freeze_count())", "0"),
        ("with uncollected(for_good=True):\n    pass\nprint(gc.get_freeze_count() > 1000)", "True"),
        # The rounds of a command: garbage of loading is gone, modules are set apart, and there is a collector.
        (
            "with uncollected():\n    left = leave_garbage()\n    print(left() is None)\n    with set_apart():\n"
            "        print(left() is None, gc.isenabled(), gc.get_freeze_count() > 1000)\n"
            "    print(gc.isenabled(), gc.get_freeze_count())\nprint(gc.isenabled())",
            "False\nTrue True True\nFalse 0\nTrue",
        ),
        ("with set_apart():\n    left = leave_garbage()\n    gc.collect()\n    print(left() is None)", "True"),
        # A process that has set something apart itself has it so afterwards.
        ("gc.freeze()\nwith set_apart():\n    pass\nprint(gc.get_freeze_count() > 1000)", "True"),
    ],
)
def test_the_collector(code, printed):
    done = subprocess.run([sys.executable, "-c", CYCLE + code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == printed
