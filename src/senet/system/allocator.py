"""The C library's memory: asked to keep what a training step frees, for the next step wants it again."""

from __future__ import annotations

import ctypes
import os
import sys

# The numbers of malloc.h, and the variables by which a user has the choice: mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
_LARGEST = 2**31 - 1  # bytes: what fits C's int
_LARGEST_OF_OLD = 2**25  # older versions give larger pieces back whatever is said


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed memory for this process, instead of giving it back to the system.

    For training on a CPU under Linux. Left alone, glibc returns large feature maps during each step, and the system
    zeroes every page of them when they are asked for again: a sixth of ResNet-50's train step, a fifth of
    SE-ResNet-50's (measured in docs/zero-tax.md). The peak of memory stays the same, but is not given back before the
    process ends. Call it before the first step; ``senet train`` and ``senet compare`` do.

    Returns:
        whether it was done: not without glibc (musl, macOS, Windows), nor where the environment says something else
        (``MALLOC_TRIM_THRESHOLD_`` and its like).
    """
    if sys.platform != "linux" or any(name in os.environ for name in _VARIABLES):
        return False
    c = ctypes.CDLL(None)
    if not hasattr(c, "gnu_get_libc_version"):
        return False
    mapped = c.mallopt(_MMAP_THRESHOLD, _LARGEST) or c.mallopt(_MMAP_THRESHOLD, _LARGEST_OF_OLD)
    return bool(mapped and c.mallopt(_TRIM_THRESHOLD, _LARGEST))
