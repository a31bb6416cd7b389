"""Digests: what a byte string is called when it must be recognised later.

Blobs use XXH3-128 (about 26 GB/s a core): it guards against damage, not against an adversary.
The event chain uses SHA-256, because an edited log must not be able to hide.
"""

import hashlib

import xxhash

BLOB_ALGORITHM = "xxh3-128"
CHUNK_BYTES = 8 * 1024 * 1024  # bytes hashed at a time: a bound on how long the GIL-free call runs


def blob_digest(data: bytes | memoryview) -> str:
    """Return ``"xxh3-128:<32 hex digits>"`` of ``data``."""
    hasher = xxhash.xxh3_128()
    view = memoryview(data).cast("B")
    for start in range(0, len(view), CHUNK_BYTES):
        hasher.update(view[start : start + CHUNK_BYTES])
    return f"{BLOB_ALGORITHM}:{hasher.hexdigest()}"


def chain_digest(data: bytes) -> str:
    """Return the digest (SHA-256, 64 hex digits) by which an event names the one before it."""
    return hashlib.sha256(data).hexdigest()
