"""How much memory may still be taken, so that too little is said before it is taken.

Filling a shared memory beyond its file system's size is an error that can be handled. Filling it beyond what the
control group or the machine has is none: the kernel kills a process. So all three are asked, and the least counts.
Pages of files that the kernel can drop are counted as free, as the kernel does itself.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from dtrain.storage.control_groups import CGROUP_ROOT, PROC, memory_groups, text_of


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
    for line in text_of(proc / "meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return [Free(size_bytes=int(value.split()[0]) * 1024, where="this machine")]
    return []


def _control_groups(proc: Path, root: Path) -> list[Free]:
    """The bounds of this process's memory group and of all above it."""
    found: list[Free] = []
    for group in memory_groups(proc=proc, root=root):
        most, used = group.limit_bytes, group.used_bytes
        if most is not None and used is not None:
            free_bytes = max(0, most - used + group.droppable_bytes)
            found.append(Free(size_bytes=free_bytes, where=f"the control group {group.folder} (limit {most} bytes)"))
    return found
