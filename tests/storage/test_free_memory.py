"""How much memory is left, read from what Linux says."""

import os
from pathlib import Path

import pytest

from dtrain.storage.control_groups import memory_groups
from dtrain.storage.free_memory import free_for

GIB = 1 << 30


def machine(folder: Path, *, groups: str, available_kib: int = 1 << 40) -> Path:
    proc = folder / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {available_kib} kB\n")
    (proc / "self" / "cgroup").write_text(groups)
    return proc


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


@pytest.fixture
def cgroups(tmp_path: Path) -> Path:
    root = tmp_path / "cgroup"
    root.mkdir()
    return root


def test_the_file_system_bounds_when_nothing_else_does(tmp_path: Path, cgroups: Path) -> None:
    free = free_for(tmp_path, proc=machine(tmp_path, groups=""), cgroup_root=cgroups)
    stats = os.statvfs(tmp_path)
    assert "file system" in free.where and abs(free.size_bytes - stats.f_bavail * stats.f_frsize) < GIB


def test_the_machine_bounds_when_it_has_least(tmp_path: Path, cgroups: Path) -> None:
    free = free_for(tmp_path, proc=machine(tmp_path, groups="", available_kib=1024), cgroup_root=cgroups)
    assert (free.size_bytes, free.where) == (1024 * 1024, "this machine")


def test_a_limit_of_a_group_above_counts_and_droppable_pages_are_free(tmp_path: Path, cgroups: Path) -> None:
    group(cgroups / "pod", memory__max=3000, memory__current=2500, memory__stat="anon 1\ninactive_file 100")
    group(cgroups / "pod" / "job", memory__max="max", memory__current=10)
    free = free_for(tmp_path, proc=machine(tmp_path, groups="0::/pod/job\n"), cgroup_root=cgroups)
    assert free.size_bytes == 600 and str(cgroups / "pod") in free.where


def test_version_1_is_read_and_its_word_for_no_limit_is_none(tmp_path: Path, cgroups: Path) -> None:
    group(cgroups / "memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=5)
    group(
        cgroups / "memory" / "a",
        memory__limit_in_bytes=1000,
        memory__usage_in_bytes=1200,
        memory__stat="total_inactive_file 50",
    )
    proc = machine(tmp_path, groups="9:name=systemd:/x\n4:cpu,memory:/a\n0::/\n")
    assert free_for(tmp_path, proc=proc, cgroup_root=cgroups).size_bytes == 0


def test_in_a_container_the_path_seen_from_outside_leads_to_its_own_root(tmp_path: Path, cgroups: Path) -> None:
    group(cgroups, memory__max=700, memory__current=100)
    free = free_for(tmp_path, proc=machine(tmp_path, groups="0::/docker/f00\n"), cgroup_root=cgroups)
    assert free.size_bytes == 600


@pytest.mark.parametrize(
    ("groups", "path", "limit", "kills"),
    [
        ("0::/job\n", "job", "memory__max", "memory.events"),
        ("4:memory:/job\n0::/\n", "memory/job", "memory__limit_in_bytes", "memory.oom_control"),
    ],
    ids=["version 2", "version 1"],
)
def test_the_kernels_count_of_kills_is_found_with_the_limit(
    tmp_path: Path, cgroups: Path, groups: str, path: str, limit: str, kills: str
) -> None:
    group(cgroups / path, **{limit: 4096})
    (own, *_) = memory_groups(proc=machine(tmp_path, groups=groups), root=cgroups)
    assert (own.kills_file, own.limit_bytes) == (cgroups / path / kills, 4096)


def test_this_machine_has_some() -> None:
    assert free_for(Path("/tmp")).size_bytes > 0
