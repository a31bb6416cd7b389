"""Ending a process without waiting for its threads."""

import atexit
import os
import sys
from typing import NoReturn

EXIT_UNWRITTEN = 1  # all went well, but for what was to be printed


def leave(code: int) -> NoReturn:
    """End now. What was registered to run at exit is run; no thread is waited for, which may hang in a storage."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # its reader has left, or it is closed
            code = code or EXIT_UNWRITTEN
    os._exit(code)
