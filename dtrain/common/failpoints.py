"""Failpoints: named moments at which a test can make a process die, stop, err or dawdle.

What survives a crash is decided by the order of a few acts: append, journal, stage, upload, acknowledge, write a
manifest, commit, mark, spawn. A kill at random seldom falls between two of them, so each has a name here, and tests
strike at every one of them in real processes.

    DTRAIN_FAILPOINTS="append.after=exit@2;upload.before=error;marker.before=delay:0.2"
    DTRAIN_FAILPOINTS_TRACE=/path/of/a/file

``name=action`` or ``name=action@n``: the n-th time that a process passes the point. Actions:

- ``exit``: the process ends at once, with nothing tidied up;
- ``pause``: it stops (SIGSTOP) until somebody continues it;
- ``error``: :class:`FailpointError` is raised, as if the world had refused;
- ``delay:<seconds>``: the thread that passes sleeps.

Rules:
- off unless ``arm`` found the variables, and then one look at a module variable;
- a point fires once for each trace file, whatever processes pass it, so that a restarted one goes on;
- the trace is written before the action: one line of JSON, so that a test can assert that its fault struck.
"""

import fcntl
import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import assert_never

from dtrain.common.errors import RetryableError, UserError

POINTS_VARIABLE = "DTRAIN_FAILPOINTS"
TRACE_VARIABLE = "DTRAIN_FAILPOINTS_TRACE"
EXIT_CODE = 86  # of a process that was made to exit: no other part of dtrain ends with it


class FailpointError(RetryableError):
    """Raised on order of a test."""


class Point(StrEnum):
    """Every failpoint there is."""

    # coordinator
    APPEND_BEFORE = "append.before"
    APPEND_AFTER = "append.after"  # etcd has the events, nobody has acted on them; an error: the answer is lost
    COMMIT_BEFORE = "commit.before"  # as above, for a transaction that commits a checkpoint
    COMMIT_AFTER = "commit.after"
    MANIFEST_BEFORE = "manifest.before"
    MANIFEST_AFTER = "manifest.after"
    MARKER_BEFORE = "marker.before"
    MARKER_AFTER = "marker.after"
    # worker
    JOURNAL_BEFORE = "journal.before"
    JOURNAL_WITHIN = "journal.within"  # everything of a step is written, nothing is committed
    JOURNAL_AFTER = "journal.after"
    SPAWN_BEFORE = "spawn.before"
    SPAWN_AFTER = "spawn.after"
    UPLOAD_BEFORE = "upload.before"
    UPLOAD_WITHIN = "upload.within"  # the shard is stored, its index is not
    UPLOAD_AFTER = "upload.after"
    ACK_BEFORE = "ack.before"  # the journal holds the acknowledgement, no snapshot has told it
    ACK_AFTER = "ack.after"
    # trainer
    STAGE_BEFORE = "stage.before"
    STAGE_WITHIN = "stage.within"  # the bytes are there, the mailbox does not say so
    STAGE_AFTER = "stage.after"


class Action(StrEnum):
    EXIT = "exit"
    PAUSE = "pause"
    ERROR = "error"
    DELAY = "delay"


@dataclass(slots=True, kw_only=True)
class _Trap:
    action: Action
    delay_s: float  # of DELAY
    at: int  # fires when the point is passed for the at-th time; Invariant: >= 1
    passed: int = 0


@dataclass(slots=True, kw_only=True)
class _Armed:
    trace: str
    traps: dict[Point, _Trap] = field(default_factory=dict)


_armed: _Armed | None = None


def arm(environment: Mapping[str, str]) -> None:
    """Set what the environment asks for, for this process. Raises UserError if that cannot be understood."""
    global _armed
    text = environment.get(POINTS_VARIABLE, "")
    _armed = _parse(text, environment.get(TRACE_VARIABLE, "")) if text else None


def hit(point: Point) -> None:
    """Pass the point. Raises FailpointError if a test wants it."""
    if _armed is not None:
        _pass(_armed, point)


def _parse(text: str, trace: str) -> _Armed:
    if not trace:
        raise UserError(f"{POINTS_VARIABLE} is set without {TRACE_VARIABLE}: name the file that tells what fired.")
    armed = _Armed(trace=trace)
    for entry in filter(None, text.split(";")):
        name, _, what = entry.partition("=")
        action, _, times = what.partition("@")
        action, _, seconds = action.partition(":")
        try:
            armed.traps[Point(name)] = _Trap(
                action=Action(action), delay_s=float(seconds or 0), at=int(times) if times else 1
            )
        except ValueError as error:
            raise UserError(
                f"{POINTS_VARIABLE}: {entry!r} is not valid ({error}): give NAME=ACTION, as in append.after=exit@2."
            ) from error
    return armed


def _pass(armed: _Armed, point: Point) -> None:
    trap = armed.traps.get(point)
    if trap is None:
        return
    trap.passed += 1
    if trap.passed < trap.at or not _claim(armed.trace, point, trap):
        return
    match trap.action:
        case Action.EXIT:
            os._exit(EXIT_CODE)
        case Action.PAUSE:
            os.kill(os.getpid(), signal.SIGSTOP)
        case Action.ERROR:
            raise FailpointError(f"failpoint {point}")
        case Action.DELAY:
            time.sleep(trap.delay_s)
        case unreachable:
            assert_never(unreachable)


def _claim(trace: str, point: Point, trap: _Trap) -> bool:
    """Write into the trace that the point fires; False if it has fired before."""
    file = os.open(trace, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        with open(file, "rb", closefd=False) as lines:
            if any(json.loads(line)["point"] == point for line in lines):
                return False
        said = {"point": point, "action": trap.action, "pid": os.getpid(), "passed": trap.passed}
        os.write(file, json.dumps(said).encode() + b"\n")
        return True
    finally:
        os.close(file)
