"""Memory settings for training on a CPU: keep large temporaries instead of returning them to the system every step.

glibc hands every large block back at once, and the kernel clears its pages again on the next use. On SmolLM2-135M that
was a fifth of the step (docs/log.md, 2026-11-22).
"""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4  # malloc.h
TOP_PAD_BYTES = 64 * 2**20
LARGE_BYTES = 2**20


def tune() -> bool:
    """Ask malloc to keep what it has and, if torch is not imported yet, for huge pages. True where that applied.

    Process-wide and harmless to results; memory that training no longer needs goes back to the system when the
    process ends. `TUNESMITH_ALLOCATOR=off` leaves everything as it is.
    """
    if not is_wanted():
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by libc10 at its first allocation
    return told_malloc({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: TOP_PAD_BYTES})


def save_memory() -> bool:
    """Ask malloc to return large blocks at once after all, for a run that is short of memory. True where it applied.

    Kept blocks leave holes that glibc 2.36 does not fill again: SmolLM2-135M under gradient checkpointing held 3.9 GB
    for 0.8 GB in use (docs/log.md).
    """
    return is_wanted() and told_malloc({M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: LARGE_BYTES})


def is_wanted() -> bool:
    """Whether malloc may be told anything here."""
    return os.environ.get("TUNESMITH_ALLOCATOR") != "off" and sys.platform.startswith("linux")


def told_malloc(options: dict[int, int]) -> bool:
    """Set the options of `malloc.h`; false where the C library is not glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(name, value) for name, value in options.items())
