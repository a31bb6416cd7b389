"""A store in memory, which fails when told to: the model that the real stores are compared with.

``fail_next`` queues what the next calls meet. A fault may strike before the call does anything, after it did
everything (the answer is lost), or be a wait until the test lets it go on. ``flip_bit`` damages what is kept.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dtrain.common.errors import ShardDamagedError
from dtrain.storage.keys import validate_key, validate_prefix
from dtrain.storage.metering import UNMETERED, Meter
from dtrain.storage.objects import AlreadyExists, NotFound, ObjectInfo, StorageRefused
from dtrain.storage.parts import FileParts

_Result = TypeVar("_Result")
_Bytes = TypeVar("_Bytes", bytearray, memoryview)

HELD_MAX_S = 60.0  # a held call goes on after this, so that a failed test ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What befalls one call."""

    operation: str = ""  # "put", "get", "read_into", "head", "list", "delete"; empty: any
    key_part: str = ""  # only calls whose key holds this
    error: Exception | None = None  # raised, if any
    after: bool = False  # raised once the call has taken effect: a lost answer
    hold: threading.Event | None = None  # the call waits for this first


class MemoryStore:
    """See :class:`dtrain.storage.objects.ObjectStore`. ``calls`` records (operation, key) of every call."""

    def __init__(self, name: str = "model") -> None:
        self.calls: list[tuple[str, str]] = []
        self._uri = f"memory://{name}"
        self._objects: dict[str, bytes] = {}
        self._faults: deque[Fault] = deque()
        self._lock = threading.Lock()

    @property
    def uri(self) -> str:
        return self._uri

    def fail_next(self, *faults: Fault) -> None:
        """Queue faults; each befalls the first later call that it fits, once."""
        with self._lock:
            self._faults.extend(faults)

    @property
    def faults_left(self) -> int:
        """How many queued faults have not fired: a test asserts 0, or it tested nothing."""
        with self._lock:
            return len(self._faults)

    def flip_bit(self, key: str, *, byte: int = -1, bit: int = 0) -> None:
        """Damage one bit of a kept object."""
        with self._lock:
            data = bytearray(self._objects[key])
            data[byte] ^= 1 << bit
            self._objects[key] = bytes(data)

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False) -> None:
        def act() -> None:
            if if_absent and key in self._objects:
                raise AlreadyExists(f"{key} is already in {self._uri}")
            parts = key.split("/")
            above = {"/".join(parts[:depth]) for depth in range(1, len(parts))}
            if above & self._objects.keys() or any(other.startswith(key + "/") for other in self._objects):
                raise StorageRefused(f"{key} would be, or lie in, the folder of another object")
            self._objects[key] = bytes(data)

        self._call("put", validate_key(key), act)

    def put_file(self, key: str, source: FileParts, *, meter: Meter = UNMETERED) -> None:
        meter.before(source.size_bytes)
        self.put(key, source.mapped().joined())
        meter.moved(source.size_bytes)

    def abandon(self, prefix: str) -> None:
        self._call("abandon", validate_prefix(prefix), lambda: None)

    def get(self, key: str) -> bytes:
        return self._call("get", validate_key(key), lambda: self._found(key))

    def read_into(self, key: str, target: memoryview, *, offset: int = 0) -> None:
        def act() -> None:
            view = target.cast("B")
            data = self._found(key)
            if len(data) < offset + len(view):
                raise ShardDamagedError(key, f"has {len(data)} bytes, too few for {len(view)} from {offset} on")
            view[:] = data[offset : offset + len(view)]

        self._call("read_into", validate_key(key), act)

    def local_path(self, key: str) -> Path | None:
        return None

    def head(self, key: str) -> ObjectInfo | None:
        def act() -> ObjectInfo | None:
            data = self._objects.get(key)
            return None if data is None else ObjectInfo(key=key, size_bytes=len(data))

        return self._call("head", validate_key(key), act)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        def act() -> dict[str, int]:
            return {key: len(data) for key, data in self._objects.items() if key.startswith(prefix)}

        found = self._call("list", validate_prefix(prefix), act)
        for key in sorted(found, key=str.encode):
            yield ObjectInfo(key=key, size_bytes=found[key])

    def delete(self, key: str) -> None:
        self._call("delete", validate_key(key), lambda: self._objects.pop(key, None))

    def _found(self, key: str) -> bytes:
        if key not in self._objects:
            raise NotFound(f"{key} is not in {self._uri}")
        return self._objects[key]

    def _call(self, operation: str, key: str, act: Callable[[], _Result]) -> _Result:
        with self._lock:
            self.calls.append((operation, key))
            fault = self._take_fault(operation, key)
        if fault is not None:
            if fault.hold is not None:
                fault.hold.wait(HELD_MAX_S)
            if fault.error is not None and not fault.after:
                raise fault.error
        with self._lock:
            result = act()
        if fault is not None and fault.error is not None:
            raise fault.error
        return result

    def _take_fault(self, operation: str, key: str) -> Fault | None:
        for fault in self._faults:
            if fault.operation in ("", operation) and fault.key_part in key:
                self._faults.remove(fault)
                return fault
        return None


class Crackling(MemoryStore):
    """A store behind a way that flips a bit in each of the first so many answers about objects of a name."""

    def __init__(self, key_part: str, times: int) -> None:
        super().__init__()
        self._key_part = key_part
        self.times = times

    def get(self, key: str) -> bytes:
        return bytes(self._carried(key, bytearray(super().get(key))))

    def read_into(self, key: str, target: memoryview, *, offset: int = 0) -> None:
        super().read_into(key, target, offset=offset)
        self._carried(key, target)

    def _carried(self, key: str, data: _Bytes) -> _Bytes:
        if self._key_part in key and self.times:
            self.times -= 1
            data[len(data) // 2] ^= 1
        return data
