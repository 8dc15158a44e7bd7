"""What malloc is told, each in a process of its own: the settings stay until it ends."""

import subprocess
import sys

import pytest

from tunesmith import allocator

HEAP = """
import resource, sys
{before}
from tunesmith import allocator
told = allocator.tune()
maps = open("/proc/self/smaps").read().split("VmFlags:")
heaps = [(part, flags.split("\\n")[0]) for part, flags in zip(maps, maps[1:]) if "[heap]" in part]
huge = [int(part.split("Rss:")[1].split()[0]) for part, flags in heaps if " hg" in flags]
print(told, len(huge), sum(huge))
"""
pytestmark = pytest.mark.skipif(
    not allocator.told_malloc({}) or allocator.addresses_count(),
    reason="needs Linux with glibc, addresses not counted",
)


def heap_after(before: str = "", **environment: str) -> list[int]:
    """Whether malloc was told, parts of the heap for huge pages, and KiB of them in use."""
    command = [sys.executable, "-c", HEAP.format(before=before)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={"PYTHONPATH": "src", **environment}
    )
    told, *counts = done.stdout.split()
    return [told == "True", *map(int, counts)]


def test_the_heap_asks_for_huge_pages_and_takes_none_before_it_is_used():
    told, parts, used = heap_after()
    assert told
    assert parts == 1
    assert used < 4 * 1024


def test_switched_off_nothing_is_asked_for():
    assert heap_after(TUNESMITH_ALLOCATOR="off") == [False, 0, 0]


def test_where_addresses_are_limited_the_heap_stays_as_it_is():
    limited = "resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))"
    assert heap_after(limited) == [True, 0, 0]


def test_a_run_short_of_memory_gives_large_blocks_back():
    code = """
import ctypes
from tunesmith import allocator
allocator.tune()
assert allocator.save_memory()
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
before, size = resident(), 128 * 2**20
blocks = [libc.malloc(size) for _ in range(2)]
for block in blocks:
    ctypes.memset(block, 1, size)
full = resident()
libc.free(blocks[0])  # the other stands behind it, in a heap it could not be given back
print(full - before > 1.9 * size, full - resident() > 0.9 * size)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": "src"})
    assert done.stdout == "True True\n", done.stderr


def test_strict_overcommit_counts_addresses(monkeypatch):
    monkeypatch.setattr("pathlib.Path.read_text", lambda _path: "2\n")
    assert allocator.addresses_count()
