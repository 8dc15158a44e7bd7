"""The machine's main memory: what is free for this process, its container's limits heeded, and what it holds."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")


class Names(NamedTuple):
    """Files of a control group's folder that say how much memory it may hold, and the pages of files in it."""

    limit: str
    used: str
    files: str


VERSION_1 = Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = Names("memory.max", "memory.current", "inactive_file")


def free_bytes() -> float:
    """Bytes that this process could still get; infinite where nobody can say."""
    available = kibibytes("/proc/meminfo", "MemAvailable")
    return min([available, *(left(folder, names) for folder, names in memory_groups())])


def usable_bytes() -> float:
    """Bytes that this process could hold in all: what it holds already, pages of files aside, and what is free."""
    own = kibibytes("/proc/self/status", "RssAnon")  # pages of files count as free already
    return free_bytes() + (own if own < float("inf") else 0.0)


def resident_bytes() -> float:
    """Bytes that this process holds now; 0 where nobody can say."""
    held = kibibytes("/proc/self/status", "VmRSS")
    return held if held < float("inf") else 0.0


def kibibytes(path: str, name: str) -> float:
    """The value of a line such as `MemAvailable:  123 kB`, in bytes; infinite where there is none."""
    try:
        with open(path, encoding="ascii", errors="replace") as lines:
            return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
    except (OSError, StopIteration):
        return float("inf")


def memory_groups() -> Iterator[tuple[Path, Names]]:
    """Folders of the control groups that this process is in, innermost first: a limit on any of them holds.

    In a container the path may be the host's; then only the outermost folder is there, and is the container's own.
    """
    try:
        lines = OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, names = (GROUPS / "memory", VERSION_1) if controllers else (GROUPS, VERSION_2)
        inner = top / path.strip("/")
        yield from ((folder, names) for folder in (inner, *inner.parents) if folder.is_relative_to(top))


def left(folder: Path, names: Names) -> float:
    """What a control group's limit leaves free; infinite where it has none."""
    try:
        limit, used = ((folder / name).read_text(encoding="ascii") for name in (names.limit, names.used))
        pages = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return float(int(limit) - int(used) + int(pages[names.files]))
    except (OSError, ValueError, KeyError):  # "max" is no number
        return float("inf")
