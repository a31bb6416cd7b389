"""A chaos run that is interrupted, or killed itself, leaves no process, no folder and no shared memory behind."""

import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.runner import INTERRUPTED_CODE
from tests.support.facts import wait_for
from tests.support.processes import marked, shared_folders

ROOT = Path(__file__).parents[2]
RUN_MARK = "CHAOSRUN_MARK"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_run_that_was_ended(number: signal.Signals, tmp_path: Path) -> None:
    scratch, mark = tmp_path / "scratch", secrets.token_hex(8)
    scratch.mkdir()
    env = {**os.environ, "TMPDIR": str(scratch), RUN_MARK: mark}
    argv = [sys.executable, "-m", "tests.chaos.runner", "--minutes", "5"]
    with (tmp_path / "log").open("wb") as log:
        runner = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)
    shared = lambda: [path for world in scratch.glob("*/world") for path in shared_folders(world)]  # noqa: E731
    try:
        there = wait_for("ranks that are started", lambda: shared() or None, deadline_s=120)
    finally:
        os.kill(runner.pid, number)
        code = runner.wait(60)
    wait_for("the end of all processes", lambda: not marked(mark, name=RUN_MARK), deadline_s=30)
    assert code == (-number if number == signal.SIGKILL else INTERRUPTED_CODE), (tmp_path / "log").read_text()
    assert not list(scratch.iterdir())
    assert not [path for path in there if path.exists()]
