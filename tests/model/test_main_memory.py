"""What is free for a process, under the limits of control groups of both versions."""

from pathlib import Path

import pytest

from tunesmith.model import main_memory

GIB = 2**30


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A machine with 16 GiB available; the function writes this process's groups and the files of folders."""

    def write(own: str, **limits: tuple[str, int]) -> None:
        (tmp_path / "cgroup").write_text(own)
        for name, (limit, used) in limits.items():
            folder = tmp_path / "fs" / name.replace("__", "/").rstrip("/")
            folder.mkdir(parents=True, exist_ok=True)
            names = main_memory.VERSION_1 if "memory" in name else main_memory.VERSION_2
            (folder / names.limit).write_text(f"{limit}\n")
            (folder / names.used).write_text(f"{used}\n")
            (folder / "memory.stat").write_text(f"anon 5\n{names.files} {GIB}\n")

    monkeypatch.setattr(main_memory, "OWN_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(main_memory, "GROUPS", tmp_path / "fs")
    monkeypatch.setattr(main_memory, "kibibytes", lambda path, name: 16.0 * GIB)
    return write


def test_no_control_group_limits_nothing(groups):
    assert main_memory.free_bytes() == 16 * GIB
    groups("0::/user.slice/session.scope\n")
    assert main_memory.free_bytes() == 16 * GIB


def test_a_limit_leaves_what_is_not_used_and_pages_of_files(groups):
    groups("0::/\n", __=(str(4 * GIB), 2 * GIB))
    assert main_memory.free_bytes() == 3 * GIB


def test_the_limit_of_an_outer_group_holds(groups):
    groups("0::/outer/inner\n", outer=(str(4 * GIB), 3 * GIB), outer__inner=("max", 2 * GIB))
    assert main_memory.free_bytes() == 2 * GIB


def test_limits_of_version_1(groups):
    own = "9:name=systemd:/\n5:cpu,cpuacct:/a\n4:memory:/docker/abc\n0::/\n"
    groups(own, memory=(str(2**63 - 4096), 8 * GIB), memory__docker__abc=(str(6 * GIB), GIB))
    assert main_memory.free_bytes() == 6 * GIB


def test_in_a_container_the_hosts_path_is_not_there_and_the_top_counts(groups):
    groups("4:memory:/docker/abc\n", memory=(str(6 * GIB), 2 * GIB))
    assert main_memory.free_bytes() == 5 * GIB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_this_process_holds_less_than_it_could():
    assert 0 < main_memory.resident_bytes() < main_memory.usable_bytes()


def test_where_nobody_can_say_nothing_is_held_and_anything_is_free(monkeypatch):
    monkeypatch.setattr(main_memory, "kibibytes", lambda path, name: float("inf"))
    monkeypatch.setattr(main_memory, "memory_groups", lambda: iter(()))
    assert (main_memory.resident_bytes(), main_memory.free_bytes(), main_memory.usable_bytes()) == (
        0.0,
        float("inf"),
        float("inf"),
    )


def test_a_figure_that_is_missing_is_no_figure(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  12 kB\nMemAvailable:  3 kB\n")
    assert main_memory.kibibytes(str(tmp_path / "meminfo"), "MemAvailable") == 3 * 1024
    assert main_memory.kibibytes(str(tmp_path / "meminfo"), "VmRSS") == float("inf")
    assert main_memory.kibibytes(str(tmp_path / "nothing"), "VmRSS") == float("inf")
