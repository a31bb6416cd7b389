"""How much memory may still be taken, so that too little is said before it is taken.

Filling a shared memory beyond its file system's size is an error that can be handled. Filling it beyond what the
control group or the machine has is none: the kernel kills a process. So all three are asked, and the least counts.
Pages of files that the kernel can drop are counted as free, as the kernel does itself.
"""

import os
from dataclasses import dataclass
from pathlib import Path

UNLIMITED_BYTES = 1 << 60  # version 1 of control groups says "no limit" by some number beyond this
CGROUP_ROOT = Path("/sys/fs/cgroup")
PROC = Path("/proc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Free:
    """The tightest bound."""

    size_bytes: int
    where: str  # whose bound it is, in words


def free_for(folder: Path, *, proc: Path = PROC, cgroup_root: Path = CGROUP_ROOT) -> Free:
    """Return what files in ``folder``, a file system in memory, may still take."""
    stats = os.statvfs(folder)
    bounds = [Free(size_bytes=stats.f_bavail * stats.f_frsize, where=f"the file system of {folder}")]
    bounds += _machine(proc)
    bounds += _control_groups(proc, cgroup_root)
    return min(bounds, key=lambda bound: bound.size_bytes)


def _machine(proc: Path) -> list[Free]:
    for line in _text(proc / "meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return [Free(size_bytes=int(value.split()[0]) * 1024, where="this machine")]
    return []


def _control_groups(proc: Path, root: Path) -> list[Free]:
    """The bounds of this process's memory group and of all above it."""
    found: list[Free] = []
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, limit, usage, droppable = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, usage, droppable = (
                *(root / "memory", "memory.limit_in_bytes"),
                *("memory.usage_in_bytes", "total_inactive_file"),
            )
        else:
            continue
        group = base / path.lstrip("/")
        if not group.is_dir():  # a container sees its own group as the root, and its path from outside
            group = base
        while True:
            found += _group(group, limit, usage, droppable)
            if group == base:
                break
            group = group.parent
    return found


def _group(group: Path, limit: str, usage: str, droppable: str) -> list[Free]:
    most, used = _text(group / limit).strip(), _text(group / usage).strip()
    if not most.isdigit() or not used.isdigit() or int(most) >= UNLIMITED_BYTES:
        return []  # "max", or no such file: no bound here
    cache_bytes = 0
    for line in _text(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == droppable:
            cache_bytes = int(value)
    free_bytes = max(0, int(most) - int(used) + cache_bytes)
    return [Free(size_bytes=free_bytes, where=f"the control group {group} (limit {int(most)} bytes)")]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # not Linux, not mounted, not allowed: it sets no bound that we could know
        return ""
