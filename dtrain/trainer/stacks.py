"""Lets the worker see where this trainer stands when it is stuck.

Python's faulthandler writes the stacks of all threads when a signal comes, from C, whatever holds the interpreter's
lock. The signal's default would end the process, so it is ignored before the handler is put in place: what the
interpreter restores at its end is then harmless as well.
"""

import faulthandler
import logging
import signal
from pathlib import Path
from typing import BinaryIO

from dtrain.common.stacks import STACKS_FILE, STACKS_SIGNAL

_log = logging.getLogger("dtrain")
_answers: list[BinaryIO] = []  # faulthandler keeps the descriptor's number only: the file must stay open


def answer_with_stacks(rank_dir: Path) -> None:
    """From now on write all stacks into the rank's folder when the worker's signal comes."""
    try:
        signal.signal(STACKS_SIGNAL, signal.SIG_IGN)
        answer = (rank_dir / STACKS_FILE).open("ab", buffering=0)
        faulthandler.register(STACKS_SIGNAL, file=answer, all_threads=True)
    except (OSError, ValueError) as error:  # ValueError: joined from another thread than the main one
        _log.info("the worker cannot ask this rank for its stacks: %s", error)
        return
    _answers.append(answer)
