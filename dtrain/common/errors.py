"""The two kinds of errors, and the one kind a person sees.

Errors are translated at the edge where they arise and chained (``raise ... from``):

- :class:`RetryableError`: the world was unkind (a timeout, a refused connection). Trying again may help.
- :class:`PermanentError`: trying again cannot help.
- :class:`UserError`: a person asked for something impossible. ``str(error)`` is one clear sentence that
  names the mend; the command line prints it without a traceback and exits with code 2.

A broken invariant is none of these: it raises :class:`InvariantError` and the process stops, because
crash-only recovery from durable state is safer than going on with a state nobody understands.
"""


class DtrainError(Exception):
    """Base of all errors that dtrain raises on purpose."""


class RetryableError(DtrainError):
    """The operation did not happen, or a read failed; it is safe to try again."""


class PermanentError(DtrainError):
    """The operation was refused for good."""


class UserError(PermanentError):
    """What a person asked for cannot be done; the text says why and how to mend it."""


class DisplacedError(UserError):
    """Another process has taken this one's place in the cluster. Started again, it would take it back, and so on."""


class InvariantError(DtrainError):
    """A rule that must always hold does not. The process stops."""


class LogDamagedError(PermanentError):
    """A job's event log has a gap, an edited or an undecodable event. ``key`` names the etcd key."""

    def __init__(self, key: str, why: str) -> None:
        job_prefix = key.rsplit("/events/", 1)[0] + "/"
        super().__init__(
            f"event log damaged at {key}: {why}. Nothing was changed: restore etcd from a backup that holds it, "
            f"or give this job's history up with: etcdctl del --prefix {job_prefix}"
        )
        self.key = key
        self.why = why


class ShardDamagedError(PermanentError):
    """A checkpoint's blob is missing or does not match its recorded size or digest. ``key`` names the blob."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(f"{key}: {why}")
        self.key = key
        self.why = why


class ShardMissingError(ShardDamagedError):
    """The blob is not there at all: damage, unless the store that was asked is another, such as an unmounted folder."""

    def __init__(self, key: str) -> None:
        super().__init__(key, "is missing")
