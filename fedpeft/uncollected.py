"""No look for garbage while modules are imported and a model is loaded: what they make stays.

Python looks through all objects whenever their number has grown by a quarter. On the way to a first round that finds
next to nothing, and is a sixth of the CPU time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected(for_good: bool = False) -> Iterator[None]:
    """Python's collector of cycles waits until the block has ended.

    Args:
        for_good: the collector never looks through what is there in the end: the process lasts as long.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
        if for_good:
            gc.freeze()
    finally:
        if collects:
            gc.enable()


@contextmanager
def set_apart() -> Iterator[None]:
    """The collector works in the block, and does not look through what was there before, which lasts as long.

    Where the process has set something apart itself, it stays as it is.
    """
    collects, ours = gc.isenabled(), not gc.get_freeze_count()
    if ours:
        gc.collect(0)  # what loading has left may be as large as a model
        gc.freeze()
    gc.enable()
    try:
        yield
    finally:
        if not collects:
            gc.disable()
        if ours:
            gc.unfreeze()
