"""Names of blobs: the layout of a job's checkpoints in storage, and the one place that checks a key.

A key becomes a path on a disk or in a bucket, so a part that could climb out of its prefix must never get
that far. Job names are checked where all names are; numbers by range, so that the digits never overflow and
the order of keys stays the order of numbers. Every store checks every key again.

    jobs/<job>/checkpoints/<checkpoint>/attempt-<attempt>/rank-<rank>.safetensors
    jobs/<job>/checkpoints/<checkpoint>/attempt-<attempt>/rank-<rank>.index.json
    jobs/<job>/checkpoints/<checkpoint>/attempt-<attempt>/rank-<rank>-whole.*  (of a shard stored without its base)
    jobs/<job>/checkpoints/<checkpoint>/attempt-<attempt>/manifest.json
    jobs/<job>/checkpoints/<checkpoint>/attempt-<attempt>/CLAIMED  (by a program outside of a job)
    jobs/<job>/checkpoints/<checkpoint>/COMMITTED
    jobs/<job>/packs/attempt-<attempt>/rank-<rank>-<digest>.bin
"""

from dtrain.common.errors import PermanentError
from dtrain.common.names import AttemptNumber, CheckpointNumber, JobName, job_name
from dtrain.common.packs import packs_prefix

KEY_MAX_BYTES = 1024  # S3's limit for a key
PART_MAX_BYTES = 255  # what common file systems allow for one name
CHECKPOINT_MAX = 999_999  # six digits
ATTEMPT_MAX = 999_999  # six digits
RANK_MAX = 99_999  # five digits
RESERVED_PART = ".dtrain-"  # names of a store's own files, which no listing shows

MARKER_NAME = "COMMITTED"
CLAIM_NAME = "CLAIMED"
MANIFEST_NAME = "manifest.json"


class InvalidKey(PermanentError):
    """A key, or a number that should become part of one, is outside of what the layout allows."""


def job_prefix(job: JobName) -> str:
    """Return the prefix (with its last slash) of everything that a job keeps in storage."""
    return f"jobs/{job_name(job)}/"


def checkpoint_prefix(job: JobName, checkpoint: CheckpointNumber) -> str:
    """Return the prefix (with its last slash) of one checkpoint's attempts and its marker."""
    return f"{job_prefix(job)}checkpoints/{_number('checkpoint', checkpoint, 1, CHECKPOINT_MAX):06d}/"


def attempt_prefix(job: JobName, checkpoint: CheckpointNumber, attempt: AttemptNumber) -> str:
    """Return the prefix (with its last slash) of one attempt's shards and manifest."""
    return f"{checkpoint_prefix(job, checkpoint)}attempt-{_number('attempt', attempt, 1, ATTEMPT_MAX):06d}/"


def shard_key(
    job: JobName, checkpoint: CheckpointNumber, attempt: AttemptNumber, rank: int, *, baseless: bool = False
) -> str:
    """Return the key of one rank's shard.

    ``baseless``: of one that is stored whole although a base was named. Two tries of an upload may differ in this,
    and so in their bytes; under two keys a late end of the first cannot replace what the second was confirmed.
    """
    return _rank_key(job, checkpoint, attempt, rank, baseless) + ".safetensors"


def index_key(
    job: JobName, checkpoint: CheckpointNumber, attempt: AttemptNumber, rank: int, *, baseless: bool = False
) -> str:
    """Return the key of the index of one rank's shard; ``baseless`` as for the shard."""
    return _rank_key(job, checkpoint, attempt, rank, baseless) + ".index.json"


def _rank_key(job: JobName, checkpoint: CheckpointNumber, attempt: AttemptNumber, rank: int, baseless: bool) -> str:
    number = f"rank-{_number('rank', rank, 0, RANK_MAX):05d}"
    return attempt_prefix(job, checkpoint, attempt) + number + ("-whole" if baseless else "")


def pack_prefix(job: JobName, attempt: AttemptNumber) -> str:
    """Return the prefix (with its last slash) of the packs that an attempt made."""
    return packs_prefix(job_name(job), _number("attempt", attempt, 1, ATTEMPT_MAX))


def pack_key(job: JobName, attempt: AttemptNumber, rank: int, digest: str) -> str:
    """Return the key of a pack that an attempt made for a rank; ``digest`` is 32 hex digits."""
    return f"{pack_prefix(job, attempt)}rank-{_number('rank', rank, 0, RANK_MAX):05d}-{digest}.bin"


def manifest_key(job: JobName, checkpoint: CheckpointNumber, attempt: AttemptNumber) -> str:
    """Return the key of an attempt's manifest."""
    return attempt_prefix(job, checkpoint, attempt) + MANIFEST_NAME


def claim_key(job: JobName, checkpoint: CheckpointNumber, attempt: AttemptNumber) -> str:
    """Return the key that says that a program outside of a job took the attempt."""
    return attempt_prefix(job, checkpoint, attempt) + CLAIM_NAME


def marker_key(job: JobName, checkpoint: CheckpointNumber) -> str:
    """Return the key of a checkpoint's commit marker."""
    return checkpoint_prefix(job, checkpoint) + MARKER_NAME


def validate_key(key: str) -> str:
    """Return ``key`` if every store can keep it and it cannot leave the store's root; else raise InvalidKey."""
    if not key:
        raise InvalidKey("a key must not be empty")
    _validate_text(key)
    for part in key.split("/"):
        _validate_part(key, part)
    return key


def validate_prefix(prefix: str) -> str:
    """Return ``prefix`` if some valid key could start with it (the empty one included); else raise InvalidKey."""
    if not prefix:
        return prefix
    _validate_text(prefix)
    *folders, last = prefix.split("/")
    for part in folders:
        _validate_part(prefix, part)
    if last in (".", ".."):
        raise InvalidKey(f"prefix {prefix!r} has the part {last!r}")
    return prefix


def _number(what: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise InvalidKey(f"{what} {value} is out of range: {low} to {high}")
    return value


def _validate_text(key: str) -> None:
    try:
        size_bytes = len(key.encode())
    except UnicodeEncodeError as error:
        raise InvalidKey(f"key {key!r} is not valid Unicode") from error
    if size_bytes > KEY_MAX_BYTES:
        raise InvalidKey(f"key {key[:80]!r}... has {size_bytes} bytes; at most {KEY_MAX_BYTES} are allowed")
    # Control characters (NUL among them) cannot be carried by the XML of an S3 listing.
    if "\\" in key or any(char < " " or "\x7f" <= char <= "\x9f" for char in key):
        raise InvalidKey(f"key {key!r} holds a backslash or a control character")
    if "\ufffe" in key or "\uffff" in key:
        raise InvalidKey(f"key {key!r} holds a character that XML cannot carry")


def _validate_part(key: str, part: str) -> None:
    if part in ("", ".", ".."):
        raise InvalidKey(f"key {key!r} has the part {part!r}")
    if part.startswith(RESERVED_PART):
        raise InvalidKey(f"key {key!r} has a part that starts with {RESERVED_PART!r}, which stores keep for themselves")
    if len(part.encode()) > PART_MAX_BYTES:
        raise InvalidKey(f"key {key[:80]!r}... has a part of more than {PART_MAX_BYTES} bytes")
