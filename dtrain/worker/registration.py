"""A worker's registration in etcd: what it says, and how one that an earlier life put is recognised."""

import os

import msgspec

from dtrain.worker.rpc.convert import Identity


def registration(identity: Identity, slots: int, *, fence_after_s: float) -> bytes:
    """The value of the worker's key."""
    return msgspec.json.encode(
        {
            "worker": identity.worker,
            "host": identity.host,
            "address": identity.address,
            "slots": slots,
            "fence_after_s": fence_after_s,
            "journal": identity.journal,
            "incarnation": identity.incarnation,
            "version": identity.version,
            "pid": os.getpid(),
        }
    )


def is_of(journal: str, value: bytes) -> bool:
    """Whether an agent with this journal put it. Its data folder is locked, so whoever holds that is its only life."""
    try:
        found = msgspec.json.decode(value, type=dict[str, object])
    except msgspec.DecodeError:
        return False
    return found.get("journal") == journal
