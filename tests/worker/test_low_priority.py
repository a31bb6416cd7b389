"""Uploads give way to trainers also where the kernel weighs sessions first, and only as long as there are any."""

import errno
import os
import subprocess
import sys

import pytest

from dtrain.worker.low_priority import NICENESS, GivingWay
from tests.support.facts import wait_for

DEADLINE_S = 30.0


class Session:
    """A session's nice value, which refuses to be set as often as it is told."""

    def __init__(self) -> None:
        self.values: list[int] = []
        self.refusals = 0

    def set_niceness(self, value: int) -> None:
        if self.refusals:
            self.refusals -= 1
            raise BlockingIOError(errno.EAGAIN, "too often")
        self.values.append(value)


def test_the_session_gives_way_as_long_as_anybody_works() -> None:
    session = Session()
    both = GivingWay(session.set_niceness)
    with both:
        with both:
            pass
        assert session.values == [NICENESS]
    assert session.values == [NICENESS, 0]


@pytest.mark.parametrize("refusals", [1, 3])
def test_a_change_that_the_kernel_puts_off_is_made_later(refusals: int) -> None:
    session = Session()
    with GivingWay(session.set_niceness, again_s=0.001):
        session.refusals = refusals
    wait_for("the session is itself again", lambda: session.values == [NICENESS, 0], deadline_s=DEADLINE_S)


def test_what_was_put_off_and_is_wanted_no_more_is_not_made() -> None:
    session = Session()
    session.refusals = 1
    way = GivingWay(session.set_niceness, again_s=0.001)
    with way:
        pass
    with way:
        wait_for("it is tried again", lambda: session.values != [], deadline_s=DEADLINE_S)
    wait_for("the session is itself again", lambda: session.values[-1] == 0, deadline_s=DEADLINE_S)
    assert session.values == [NICENESS, 0]


def test_a_kernel_that_knows_no_sessions_is_no_obstacle() -> None:
    def refuse(value: int) -> None:
        raise FileNotFoundError(errno.ENOENT, "no such file")

    with GivingWay(refuse):
        pass


SCRIPT = """
import os, threading
from pathlib import Path
from dtrain.worker.low_priority import yielding_threads
group = Path("/proc/self/autogroup")
def look():
    return group.read_text().split()[-1] if group.exists() else "none", os.getpriority(os.PRIO_PROCESS, 0)
before = look()
pool = yielding_threads("test", 1)
within = pool.submit(lambda: (look()[0], os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
print(*before, *within.result())
pool.shutdown()
print(*look())
"""


@pytest.mark.parametrize("own_session", [True, False])
def test_the_kernel_is_told_if_the_session_is_the_workers_alone(own_session: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, start_new_session=own_session
    )
    first, last = done.stdout.splitlines()
    before, niceness, within, of_thread = first.split()
    assert int(of_thread) == max(NICENESS, int(niceness))
    if before == "none":  # this kernel has no autogroups, and nice values count everywhere
        assert within == "none"
    elif own_session:
        assert (before, within) == ("0", str(NICENESS))
    else:
        assert within == before
    if os.geteuid() == 0:  # others may have to wait for it
        assert last == f"{before} {niceness}"
