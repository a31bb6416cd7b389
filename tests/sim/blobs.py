"""A model of an object store behind the `ObjectStore` port: strong, but slow, full, absent or forgetful of answers.

Every call is made from a thread of the product and takes virtual time. `history` says what was done, when and by
whom; the checkers read it and nobody else.
"""

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.common.errors import ShardDamagedError
from dtrain.storage.metering import UNMETERED, Meter
from dtrain.storage.objects import AlreadyExists, NotFound, ObjectInfo, StorageFull, StorageUnavailable
from dtrain.storage.parts import FileParts
from tests.sim.loop import CURRENT, SimLoop

NEVER_S = 1e9


@dataclass(frozen=True, slots=True)
class Deed:
    """One change of the store."""

    at_s: float
    by: str  # process
    key: str
    data: bytes | None  # None: deleted
    confirmed: bool  # the caller was told
    rot: bool = False  # the store's own fault: the object was damaged where it lay


@dataclass(frozen=True, slots=True)
class Look:
    """One list of what is there, which the caller was given."""

    at_s: float
    prefix: str


@dataclass(slots=True)
class StoreWeather:
    """How bad the store is; the faults' plan sets it."""

    latency_s: tuple[float, float] = (0.002, 0.02)
    failing: float = 0.0  # part of calls that get a 5xx
    lost_answers: float = 0.0  # part of calls that are done and not confirmed
    slow: float = 0.0  # part of calls that take up to slow_s
    slow_s: float = 8.0
    short: float = 0.0  # part of large puts that are confirmed though the object is cut short
    full: bool = False
    cut_off: set[str] = field(default_factory=set)  # machines that do not reach it


class Blobs:
    """The bucket."""

    def __init__(self, loop: SimLoop, rng: random.Random, seen: Callable[[str], None]) -> None:
        self.loop = loop
        self.rng = rng
        self.seen = seen
        self.weather = StoreWeather()
        self.objects: dict[str, bytes] = {}
        self.history: list[Deed] = []
        self.looks: list[Look] = []
        self.on_deed: list[Callable[[Deed], None]] = []
        self.waylay: Callable[[str, bytes], bool] | None = None  # whether this put stays on its way, unanswered

    @property
    def uri(self) -> str:
        return "file:///simulated"

    # -- the port ---------------------------------------------------------------------------------------

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False) -> None:
        whole = bytes(data)
        if self.waylay is not None and self.waylay(key, whole):
            self.loop.block(NEVER_S)

        def act(confirmed: bool) -> None:
            if if_absent and key in self.objects:
                raise AlreadyExists(f"{key} exists")
            kept = whole
            if key.endswith(".safetensors") and self.weather.short and self.rng.random() < self.weather.short:
                self.seen("object cut short")
                kept = whole[: len(whole) // 2]
            self.objects[key] = kept
            self._note(key, kept, confirmed)

        if self.weather.full:
            self._wait()
            self.seen("store full")
            raise StorageFull(f"{key}: no room")
        self._call("put", act)

    def put_file(self, key: str, source: FileParts, *, meter: Meter = UNMETERED) -> None:
        self._wait()  # the bytes are read while they travel, not when the call begins
        ranges = (os.pread(source.file, end - begin, begin) for begin, end in source.ranges)
        whole = b"".join((source.head, *ranges))
        meter.before(len(whole))
        self.put(key, whole)
        meter.moved(len(whole))

    def abandon(self, prefix: str) -> None:
        """A put here is whole or was never begun."""
        self._call("abandon", lambda _: None)

    def get(self, key: str) -> bytes:
        return self._call("get", lambda _: self._found(key))

    def read_into(self, key: str, target: memoryview, *, offset: int = 0) -> None:
        def act(_: bool) -> None:
            view = target.cast("B")
            data = self._found(key)[offset : offset + len(view)]
            if len(data) < len(view):
                raise ShardDamagedError(key, "it is too short")
            view[:] = data

        self._call("read", act)

    def local_path(self, key: str) -> Path | None:
        return None

    def head(self, key: str) -> ObjectInfo | None:
        def act(_: bool) -> ObjectInfo | None:
            data = self.objects.get(key)
            return None if data is None else ObjectInfo(key=key, size_bytes=len(data))

        return self._call("head", act)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        def act(confirmed: bool) -> list[str]:
            if confirmed:
                self.looks.append(Look(self.loop.now_s, prefix))
            return [key for key in sorted(self.objects) if key.startswith(prefix)]

        found = self._call("list", act)
        for key in found:
            if key in self.objects:
                yield ObjectInfo(key=key, size_bytes=len(self.objects[key]))

    def delete(self, key: str) -> None:
        def act(confirmed: bool) -> None:
            if self.objects.pop(key, None) is not None:
                self._note(key, None, confirmed)

        self._call("delete", act)

    # -- the world's part --------------------------------------------------------------------------------

    def rot(self, key: str) -> None:
        """Damage an object where it lies."""
        data = bytearray(self.objects[key])
        data[-1 - self.rng.randrange(min(8, len(data)))] ^= 1 << self.rng.randrange(8)
        self.objects[key] = bytes(data)
        self.history.append(Deed(self.loop.now_s, "nobody", key, bytes(data), True, rot=True))

    def arrive(self, key: str, data: bytes, by: str) -> None:
        """Do a put that was on its way when its sender ended."""
        self.objects[key] = data
        self.history.append(Deed(self.loop.now_s, by, key, data, False))

    def _found(self, key: str) -> bytes:
        if key not in self.objects:
            raise NotFound(f"{key} is not there")
        return self.objects[key]

    def _note(self, key: str, data: bytes | None, confirmed: bool) -> None:
        process = CURRENT.get()
        deed = Deed(self.loop.now_s, repr(process), key, data, confirmed)
        self.history.append(deed)
        for listen in self.on_deed:
            listen(deed)

    def _wait(self) -> None:
        weather = self.weather
        slow = weather.slow and self.rng.random() < weather.slow
        self.loop.block(self.rng.uniform(0.5, weather.slow_s) if slow else self.rng.uniform(*weather.latency_s))

    def _call(self, operation: str, act: Callable[[bool], Any]) -> Any:
        self._wait()
        weather, process = self.weather, CURRENT.get()
        if process is not None and process.machine.name in weather.cut_off:
            self.loop.block(self.rng.uniform(1.0, 5.0))
            raise StorageUnavailable("no route to the store")
        if weather.failing and self.rng.random() < weather.failing:
            self.seen(f"store failed: {operation}")
            raise StorageUnavailable("503 Slow Down")
        lost = bool(weather.lost_answers) and self.rng.random() < weather.lost_answers
        result = act(not lost)
        self._wait()
        if lost:
            self.seen(f"store answer lost: {operation}")
            raise StorageUnavailable("the connection broke")
        return result
