"""A person who asks for help does not wait."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.commands import dtrain, environment

HELP_MAX_S = 0.25
BARE_TIMES_MAX = 4
TRIES = 7
HEAVY = ("grpc", "torch", "boto3", "numpy", "rich", "msgspec", "psutil", "google.protobuf", "sqlite3")


@pytest.mark.parametrize("arguments", [("--help",), ("run", "--help"), ("worker", "--help")])
def test_help_comes_within_a_quarter_of_a_second(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Or, where Python itself takes long to start, within four times that of one that only imports click."""
    bare_s, took_s = [], []
    for _ in range(TRIES):
        bare_s.append(_seconds(lambda: subprocess.run([sys.executable, "-c", "import click"], check=True)))
        took_s.append(_seconds(lambda: dtrain(*arguments, cwd=tmp_path)))
    # The least of each: what else the machine does only ever adds.
    assert min(took_s) < max(HELP_MAX_S, BARE_TIMES_MAX * min(bare_s)), (took_s, bare_s)


def _seconds(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["history", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys; from dtrain.cli.main import main; "
        f"code = main({arguments!r}); print([m for m in {HEAVY!r} if m in sys.modules], code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.strip().splitlines()[-1] == "[] 0"


def test_every_verb_has_help(tmp_path: Path) -> None:
    top = dtrain("--help", cwd=tmp_path)
    section = top.stdout.partition("Commands:")[2]
    verbs = [line.split()[0] for line in section.splitlines() if line.startswith("  ") and line[2] != " "]
    assert "run" in verbs and len(verbs) == 17
    for verb in verbs:
        answer = dtrain(verb, "--help", cwd=tmp_path)
        assert answer.code == 0, verb
        assert answer.stdout.startswith(f"Usage: dtrain {verb}")


def test_the_version_is_said(tmp_path: Path) -> None:
    from dtrain import __version__

    assert dtrain("--version", cwd=tmp_path).stdout.strip() == f"dtrain, version {__version__}"
