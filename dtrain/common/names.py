"""Names that people choose or that become parts of keys, and the one place that validates them.

A job name becomes a part of etcd keys and of storage keys, so nothing that could leave its prefix
(``..``, ``/``, an empty name) is ever a valid name.
"""

import re
from typing import NewType

from dtrain.common.errors import UserError

JobName = NewType("JobName", str)
WorkerId = NewType("WorkerId", str)
Generation = NewType("Generation", int)  # >= 1
Term = NewType("Term", int)  # create revision of the leader key, >= 1
CheckpointNumber = NewType("CheckpointNumber", int)  # >= 1, counts the checkpoints of one job
AttemptNumber = NewType("AttemptNumber", int)  # >= 1, counts all attempts of one job, over all checkpoints
Step = NewType("Step", int)  # completed optimizer steps; 0 before the first

NAME_MAX_CHARS = 63  # a DNS label's limit, as Kubernetes uses for names
_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?")


def _validate(kind: str, text: str) -> str:
    if len(text) > NAME_MAX_CHARS or not _NAME.fullmatch(text) or ".." in text:
        raise UserError(
            f"{kind} {text[:80]!r} is not valid: use 1 to {NAME_MAX_CHARS} lower-case letters, digits, '-', '_' "
            "or '.', starting and ending with a letter or digit."
        )
    return text


def job_name(text: str) -> JobName:
    """Return ``text`` as a job name, or raise :class:`UserError`."""
    return JobName(_validate("job name", text))


def worker_id(text: str) -> WorkerId:
    """Return ``text`` as a worker id, or raise :class:`UserError`."""
    return WorkerId(_validate("worker id", text))
