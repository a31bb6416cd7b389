"""A short piece of chaos, with new faults each time; `make chaos` has more of it."""

import os
import random
from pathlib import Path

import pytest

from tests.chaos.runner import run

MINUTES = 0.6


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_a_job_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    seed = int(os.environ.get("DTRAINTEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"repeat with: DTRAINTEST_SEED={seed}, or longer with: make chaos SEED={seed}")
    ledger = run(tmp_path, seed=seed, minutes=MINUTES)
    print(ledger)
    assert not ledger.findings
