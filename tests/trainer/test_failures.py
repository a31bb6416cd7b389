"""How a script ends that leaves by ``sys.exit``: by the interpreter's word, whoever caught it on the way."""

import subprocess
import sys

import pytest

from tests.trainer.playing_worker import ROOT

SCRIPT = """
import sys
from dtrain.trainer.failures import leave_at_once_if_uncaught

def fail(code):
    try:
        sys.exit(code)
    except SystemExit as error:
        leave_at_once_if_uncaught(error)
        raise

class Late:
    def __del__(self):
        print("the interpreter's end was reached")

late = Late()
{rest}
"""
ENDS = {
    "uncaught": ("fail(7)", 7, ""),
    "beyond a byte": ("fail(256 + 3)", 3, ""),
    "caught": ("try: fail(7)\nexcept SystemExit: pass", 0, "the interpreter's end was reached\n"),
    "caught, and another one later": (
        "try: fail(7)\nexcept SystemExit: pass\nsys.exit(4)",
        4,
        "the interpreter's end was reached\n",
    ),
    "caught and kept": (
        "try: fail(7)\nexcept SystemExit as error: kept = error",
        0,
        "the interpreter's end was reached\n",
    ),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_script_ends_by_the_code_that_it_left_with(how: str) -> None:
    rest, code, said = ENDS[how]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(rest=rest)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, said, "")
