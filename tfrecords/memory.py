"""Keeps the memory of batches that were used for those that come."""

import ctypes
import sys

# Of mallopt(3), glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_PAD = 128 * 2**20  # bytes that the heap grows by


def keep_freed_memory():
    """Makes the C library keep freed memory for what is allocated next, instead of giving it back to the system.

    A batch of 72 images of 256 x 256 x 3 floats is 57 MB. Given back and asked for anew, its pages are made by the
    system, filled with zeros, at each batch: on a virtual machine 0.8 of the 2.0 ms that a site took there
    (recipes/results/input_speed.md). For a whole process, and for good: it stays as large as it
    has ever been. The environment does the same, from outside: `MALLOC_MMAP_MAX_=0
    MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=134217728`.

    Returns:
        bool: whether it did. Only glibc can, so that it is False on macOS, Windows and Alpine.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1), mallopt(_TOP_PAD, _PAD)])
