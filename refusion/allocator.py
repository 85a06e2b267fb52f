"""Keep freed memory in the process: on a CPU the training steps otherwise spend much of their time in page faults."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_GIB = 1 << 30


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to serve large blocks from the heap and not to give freed ones back; True where it did.

    Each activation of a training step is tens of megabytes; by default every one is mapped, zeroed page by page and
    unmapped again. Elsewhere than on Linux with glibc this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library, musl for instance
        return False
    settings = ((_M_MMAP_THRESHOLD, _GIB), (_M_TRIM_THRESHOLD, _GIB), (_M_TOP_PAD, _GIB // 4))
    return all([mallopt(name, value) == 1 for name, value in settings])
