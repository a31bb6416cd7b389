"""What holds for every test: when all are done, no process that any of them started is left."""

import contextlib
import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.facts import wait_for
from tests.support.processes import SESSION_MARK, marked

GONE_WITHIN_S = 20.0
AT_ONCE_MAX = 8  # tests: with more, the slowest ones alone decide how long all take
MEMORY_BYTES = 3 << 30  # what a test with several trainers may need


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """``-n auto``: as many tests at once as there are cores, for each may keep one busy; two on a single core.

    Tests wait for processes most of the time, so two at once take little more than half as long.
    """
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no control group, or one without a limit
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, quota // period)
    room = psutil.virtual_memory().available // MEMORY_BYTES
    return max(2, min(cores, room, AT_ONCE_MAX))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate", action="store_true", help="write what golden tests compare with; look at the diff")


@pytest.fixture
def regenerate(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be written anew."""
    return bool(request.config.getoption("--regenerate"))


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left_behind() -> Iterator[None]:
    """Set up first, so torn down last: after the servers that tests share."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it for what runs in its background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    mark = secrets.token_hex(8)
    os.environ[SESSION_MARK] = mark
    yield
    del os.environ[SESSION_MARK]
    try:
        wait_for("no process left behind", lambda: not marked(mark, name=SESSION_MARK), deadline_s=GONE_WITHIN_S)
    except AssertionError:
        raise AssertionError(f"processes left behind: {marked(mark, name=SESSION_MARK)}") from None
