"""What is said of a pack: an object that holds tensors which did not change from one checkpoint to the next.

A pack belongs to no single checkpoint. It is made by one attempt, and later checkpoints name it for as long as its
tensors stay as they are. Its name begins with the attempt that made it, and attempts are numbered once: a deletion
that arrives late can never hit a newer object of the same name.
"""

from dataclasses import dataclass

PACKS_MAX = 8  # that one shard names: more would cost a restore more requests than their bytes are worth


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Pack:
    """A pack as whoever names it knows it."""

    key: str
    size_bytes: int  # > 0
    digest: str  # "xxh3-128:<hex>" of the whole pack; the key ends with the same digits


def packs_prefix(job: str, attempt: int) -> str:
    """Return the prefix (with its last slash) of every pack that this attempt made."""
    return f"jobs/{job}/packs/attempt-{attempt:06d}/"
