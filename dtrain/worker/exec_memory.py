"""The memory in which the kernel shows a process's arguments and environment: rewritten in a child without an exec.

Who looks at ``/proc/<pid>/environ`` reads the bytes that exec put on the process's stack. A forked trainer would show
the environment of the process it was forked from, and nobody would find it by its mark. The bytes are the process's
own, so it may write them; no privilege is needed, and what it forks shows the same.

Rules:
- before anything is overwritten, no variable of the C library may point there (``move_environment``);
- what does not fit is refused, and nothing is written then.
"""

import ctypes
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

_FIRST_FIELD = 48 - 3  # arg_start in proc_pid_stat(5), counted from the state, which follows the name


def move_environment() -> None:
    """Have the C library keep its own copy of every variable, so that the memory is free."""
    for name, value in os.environb.items():
        os.putenv(name, value)


def show_environment(environment: Mapping[str, str]) -> bool:
    """Show ``environment`` as this process's. Return whether it fits."""
    _, _, start, end = _regions()
    text = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in environment.items())
    return _fill(start, end, text)


def show_arguments(arguments: Sequence[str]) -> None:
    """Show ``arguments``, cut to what fits, as this process's command line."""
    start, end, _, _ = _regions()
    text = os.fsencode(" ".join(arguments))[: end - start - 2]
    # A last byte that is not zero tells the kernel that one text stands here, and no list.
    _fill(start, end, text.ljust(end - start - 1, b"\0") + b".")


def _regions() -> tuple[int, int, int, int]:
    """Where the arguments and the environment start and end: addresses."""
    fields = Path("/proc/self/stat").read_bytes().rsplit(b")", 1)[1].split()[_FIRST_FIELD : _FIRST_FIELD + 4]
    argument_start, argument_end, environment_start, environment_end = (int(field) for field in fields)
    return argument_start, argument_end, environment_start, environment_end


def _fill(start: int, end: int, text: bytes) -> bool:
    if not start or len(text) > end - start:
        return False
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)
    return True
