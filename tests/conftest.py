"""What holds for every test: when all are done, no process that any of them started is left."""

import os
import secrets
import signal
from collections.abc import Iterator

import pytest

from tests.support.facts import wait_for
from tests.support.processes import SESSION_MARK, marked

GONE_WITHIN_S = 20.0


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
