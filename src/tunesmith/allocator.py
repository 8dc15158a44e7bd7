"""Memory settings for training on a CPU: keep large temporaries instead of returning them to the system every step.

glibc hands every large block back at once, and the kernel clears its pages again on the next use. On SmolLM2-135M that
was a fifth of the step (docs/log.md, 2026-11-22).
"""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
TOP_PAD_BYTES = 64 * 2**20


def tune() -> bool:
    """Ask malloc to keep what it has and, if torch is not imported yet, for huge pages. True where that applied.

    Process-wide and harmless to results; memory that training no longer needs goes back to the system when the
    process ends. `TUNESMITH_ALLOCATOR=off` leaves everything as it is.
    """
    if os.environ.get("TUNESMITH_ALLOCATOR") == "off" or not sys.platform.startswith("linux"):
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by libc10 at its first allocation
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1) and mallopt(M_TOP_PAD, TOP_PAD_BYTES))
