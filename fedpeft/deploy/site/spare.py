"""A site's processes give memory back while they wait: glibc keeps what was freed, for what might be asked of it next.

After a step of training that can be as much as all activations were. While rounds follow each other it saves the kernel
work, and stays; a site waits longer than it works, on a machine that has other things to do.
"""

from __future__ import annotations

import ctypes
import gc


def release_freed() -> None:
    """Give the kernel the pages of all that was freed, cycles of Python's objects among it.

    Done on a C library that has no `malloc_trim`, it is no more than a look for garbage: of the others we know none
    that keeps as much.
    """
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # man 3 malloc_trim
        trim(0)
