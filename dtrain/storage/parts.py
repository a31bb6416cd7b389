"""An object's bytes that lie in several places: some in memory, the others in ranges of one open file.

A shard is staged whole, and only what changed since an earlier checkpoint is sent. So a put is told where the bytes
are, instead of being handed a copy in which they stand side by side.
"""

import mmap
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FileParts:
    """First ``head``, then these ranges of the file, in order. Nothing else may write the ranges meanwhile."""

    file: int  # descriptor, open for reading
    ranges: tuple[tuple[int, int], ...]  # begin <= end, positions in the file
    head: bytes = b""
    memory: memoryview | None = None  # the file's first bytes, all the ranges at least, if they are mapped already

    @property
    def size_bytes(self) -> int:
        """Of the object."""
        return len(self.head) + sum(end - begin for begin, end in self.ranges)

    def mapped(self) -> "Scattered":
        """Return the bytes through a map, without a copy. One made here is unmapped with the last view of it."""
        whole_bytes = max((end for _, end in self.ranges), default=0)
        if whole_bytes == 0:
            return Scattered([memoryview(self.head)])
        view = self.memory
        if view is None:
            view = memoryview(mmap.mmap(self.file, whole_bytes, prot=mmap.PROT_READ))
        return Scattered([memoryview(self.head), *(view[begin:end] for begin, end in self.ranges)])


class Scattered:
    """Views of memory that together are one sequence of bytes."""

    def __init__(self, views: Iterable[memoryview]) -> None:
        self.views = tuple(view.cast("B").toreadonly() for view in views if view.nbytes)

    def __len__(self) -> int:
        return sum(map(len, self.views))

    def part(self, begin: int, end: int) -> "Scattered":
        """Return bytes ``begin`` to ``end``, or as many of them as there are."""
        found: list[memoryview] = []
        at = 0
        for view in self.views:
            start, stop = max(begin - at, 0), min(end - at, len(view))
            if start < stop:
                found.append(view[start:stop])
            at += len(view)
        return Scattered(found)

    def first(self, begin: int, count: int) -> memoryview:
        """Return at most ``count`` bytes from ``begin`` on that lie side by side; empty only behind the last."""
        at = 0
        for view in self.views:
            if begin - at < len(view):
                return view[begin - at : begin - at + count]
            at += len(view)
        return memoryview(b"")

    def joined(self) -> bytes:
        """Return a copy in which they stand side by side."""
        return b"".join(self.views)
