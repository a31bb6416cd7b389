"""A key as etcd holds it, and how prefixes become ranges.

dtrain's keys are text; bytes exist only on the wire. Revisions count every write of the whole store, so they
order all keys against each other; ``create_revision`` is what fences (a key made anew has a greater one).
"""

from dataclasses import dataclass

from dtrain.etcd import wire_pb2 as wire


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyValue:
    """One key at one revision."""

    key: str
    value: bytes  # empty for a deleted key
    create_revision: int  # revision of the write that made the key; 0 for a deleted key
    mod_revision: int  # revision of its latest write or deletion, >= create_revision
    version: int  # writes since it was made, >= 1; 0 for a deleted key
    lease: int  # id of the lease it is bound to; 0 for none


def from_wire(kv: wire.KeyValue) -> KeyValue:
    return KeyValue(
        key=kv.key.decode(),
        value=kv.value,
        create_revision=kv.create_revision,
        mod_revision=kv.mod_revision,
        version=kv.version,
        lease=kv.lease,
    )


def prefix_end(prefix: str) -> bytes:
    """Return the first key behind all keys that start with ``prefix``: etcd's exclusive end of a range."""
    key = prefix.encode()
    for at in range(len(key) - 1, -1, -1):
        if key[at] < 0xFF:
            return key[:at] + bytes([key[at] + 1])
    return b"\0"  # etcd's word for "to the end of all keys"


def after(key: str) -> str:
    """Return the smallest key greater than ``key``."""
    return key + "\0"
