"""Memory settings for training on a CPU: keep large temporaries instead of returning them to the system every step.

glibc hands every large block back at once, and the kernel clears its pages again on the next use. On SmolLM2-135M that
was a fifth of the step (docs/log.md, 2026-11-22). What is kept lies on huge pages, which is another twentieth.
"""

import ctypes
import os
import sys
from functools import cache
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4  # malloc.h
TOP_PAD_BYTES = 64 * 2**20
LARGE_BYTES = 2**20
HUGE_PAGE = 2 * 2**20
MADV_HUGEPAGE = 14  # <sys/mman.h>
SHARE = 0.75
"""Of the machine's memory: addresses that the heap gets at the start. None of it is in use before it is written."""


def tune() -> bool:
    """Ask malloc to keep what it has and, if torch is not imported yet, for huge pages. True where that applied.

    Process-wide and harmless to results; memory that training no longer needs goes back to the system when the
    process ends. `TUNESMITH_ALLOCATOR=off` leaves everything as it is.
    """
    if not is_wanted():
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by libc10 at its first allocation
    told = told_malloc({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: TOP_PAD_BYTES})
    if told:
        put_heap_on_huge_pages()
    return told


@cache
def put_heap_on_huge_pages() -> bool:
    """Let the heap grow at once to where it may ever go, in addresses, and ask for huge pages there; once a process.

    malloc takes many of its blocks, such as AdamW's moments of a small layer, from pages of 4 KiB otherwise. Where
    addresses are counted (`ulimit -v`, strict overcommit) everything stays as it is.
    """
    if addresses_count():
        return False
    size = int(SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if not block:
        return False
    begin = -(-block // HUGE_PAGE) * HUGE_PAGE
    advised = libc.madvise(begin, (block + size - begin) // HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE) == 0
    libc.free(block)  # nothing is trimmed any more, so the addresses stay the heap's
    return advised


def addresses_count() -> bool:
    """Whether addresses that nobody writes to are taken from somebody, or nobody knows."""
    import resource  # not on Windows

    try:
        strict = Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    except OSError:
        return True
    return strict or resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def save_memory() -> bool:
    """Ask malloc to return large blocks at once after all, for a run that is short of memory. True where it applied.

    Kept blocks leave holes that glibc 2.36 does not fill again: SmolLM2-135M under gradient checkpointing held 3.9 GB
    for 0.8 GB in use (docs/log.md).
    """
    told = is_wanted() and told_malloc({M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: LARGE_BYTES})
    if told:
        ctypes.CDLL(None).malloc_trim(0)  # while the heap has addresses left, malloc takes large blocks from there
    return told


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
