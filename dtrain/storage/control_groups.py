"""The memory groups that this process is counted in: the kernel's bounds, and its count of kills.

Linux has two versions of control groups, which name the same things differently; both are read here and nowhere else.
A file that is not there says nothing: no bound, no kill.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

UNLIMITED_BYTES = 1 << 60  # version 1 of control groups says "no limit" by some number beyond this
CGROUP_ROOT = Path("/sys/fs/cgroup")
PROC = Path("/proc")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryGroup:
    """One control group, as the files of its version name what it counts."""

    folder: Path
    is_unified: bool  # version 2

    @property
    def limit_bytes(self) -> int | None:
        """What its processes may hold together; None without a bound of its own."""
        text = text_of(self.folder / ("memory.max" if self.is_unified else "memory.limit_in_bytes")).strip()
        return int(text) if text.isdigit() and int(text) < UNLIMITED_BYTES else None

    @property
    def used_bytes(self) -> int | None:
        """What they hold; None if that is not said."""
        text = text_of(self.folder / ("memory.current" if self.is_unified else "memory.usage_in_bytes")).strip()
        return int(text) if text.isdigit() else None

    @property
    def droppable_bytes(self) -> int:
        """Pages of files among it, that the kernel drops when it needs room."""
        wanted = "inactive_file" if self.is_unified else "total_inactive_file"
        for line in text_of(self.folder / "memory.stat").splitlines():
            name, _, value = line.partition(" ")
            if name == wanted:
                return int(value)
        return 0

    @property
    def kills_file(self) -> Path:
        """The file in which a line "oom_kill N" counts the processes of this group killed for want of memory.

        It counts them whoever was short of memory: this group, one above it, or the machine.
        """
        return self.folder / ("memory.events" if self.is_unified else "memory.oom_control")


def memory_groups(*, proc: Path = PROC, root: Path = CGROUP_ROOT) -> Iterator[MemoryGroup]:
    """This process's memory group, and all above it that can be seen from here, the nearest first."""
    for line in text_of(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base = root
        elif "memory" in controllers.split(","):
            base = root / "memory"
        else:
            continue
        folder = base / path.lstrip("/")
        if not folder.is_dir():  # a container sees its own group as the root, and its path from outside
            folder = base
        while True:
            yield MemoryGroup(folder=folder, is_unified=not controllers)
            if folder == base:
                break
            folder = folder.parent


def text_of(path: Path) -> str:
    """What the file says; nothing where it cannot be read."""
    try:
        return path.read_text()
    except OSError:  # not Linux, not mounted, not allowed
        return ""
