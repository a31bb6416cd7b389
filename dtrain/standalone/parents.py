"""A service asks the kernel, first thing, to be told when the run that started it dies.

It is asked for by the child itself and not between fork and exec in the parent: a fork of a process in which
gRPC's threads run may deadlock or crash in any code that follows it.
"""

import ctypes
import os
import signal
import sys

PARENT = "_DTRAIN_PARENT"  # pid of the run; set for services only, and not handed on by them
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def bind_to_parent() -> None:
    """Get SIGTERM when the parent named in the environment ends, however it ends. No parent named: do nothing."""
    parent = os.environ.pop(PARENT, "")
    if not parent or not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != int(parent):  # it ended before the kernel was asked
        raise SystemExit("the run that started this service has ended")
