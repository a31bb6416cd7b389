"""When the script fails: say so where others look, and leave at once.

Others look in two places: the record that torchrun's convention wants (TORCHELASTIC_ERROR_FILE), and the worker's
mailbox. Leaving at once matters as much. A rank that dies with a collective under way would, at the interpreter's
end, wait for the peers in that collective, while they wait for it: so the process ends after the traceback and the
exit handlers, without taking the process group down.
"""

import atexit
import json
import logging
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from dtrain.common.leaving import leave

_log = logging.getLogger("dtrain")

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells say it


def one_line(error: BaseException) -> str:
    """Return the error as the last line of its traceback says it, with its first line only."""
    text = "".join(traceback.format_exception_only(error)).strip()
    return text.splitlines()[0] if text else type(error).__name__


def write_error_file(path: Path, error: BaseException) -> None:
    """Write the record that torch's ``@record`` writes. A failure to do so is logged: the error itself matters more."""
    record = {
        "message": {
            "message": one_line(error),
            "extraInfo": {
                "py_callstack": "".join(traceback.format_exception(error)),
                "timestamp": str(int(time.time())),
            },
        }
    }
    try:
        path.write_text(json.dumps(record))
    except OSError as problem:
        _log.warning("could not write the error file %s: %s", path, problem)


def is_failure(error: BaseException | None) -> bool:
    """Say whether leaving with ``error`` means that the script failed. ``sys.exit(0)`` does not."""
    return error is not None and not (isinstance(error, SystemExit) and error.code in (None, 0))


def leave_at_once_if_uncaught(error: BaseException) -> None:
    """Arrange that ``error``, if nobody catches it, ends the process right after its traceback is printed."""
    if isinstance(error, SystemExit):
        vars(error)["_dtrain_watch"] = _Watch(error.code)
        return
    inner = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        inner(kind, error, trace)
        _leave(EXIT_INTERRUPTED if issubclass(kind, KeyboardInterrupt) else EXIT_FAILED)

    sys.excepthook = hook


class _Watch:
    """Held by a SystemExit, for which no hook is called: has the process left by its code if nobody caught it.

    Then it is the interpreter that lets go of it, when no frame is left to run. Exit handlers that are registered from
    there on run first, and by then the interpreter has printed what ``sys.exit("text")`` says.
    """

    def __init__(self, code: object) -> None:
        self._code = code & 0xFF if isinstance(code, int) else EXIT_FAILED

    def __del__(self) -> None:
        if sys._getframe().f_back is None and not sys.is_finalizing():
            atexit.register(_leave, self._code)


def _leave(code: int) -> NoReturn:
    atexit.unregister(_leave)
    leave(code)
