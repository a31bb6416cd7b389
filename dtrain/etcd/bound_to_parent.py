"""Becomes another program that is killed when its parent ends, however the parent ends.

Run as a script: ``bound_to_parent.py PARENT_PID PROGRAM [ARGUMENT...]``. A parent that is killed with -9
cannot clean up, so the kernel does it (PR_SET_PDEATHSIG). That mark survives the exec. It is set here, in a
small program of its own, and not between fork and exec in the parent: Python code that runs there deadlocks
when another thread, such as one of gRPC's, held a lock at the fork.

The kernel counts the *thread* that started the child as its parent: that thread must live on.

Imports the standard library only and is started without site-packages: it costs about 15 ms.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def _main(parent_pid: int, command: list[str]) -> None:
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # A parent that ended before the mark was set will never be noticed by it.
    if os.getppid() != parent_pid:
        raise SystemExit("the parent has ended")
    os.execv(command[0], command)


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2:])
