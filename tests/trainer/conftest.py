"""One process that has imported torch, for all tests that start scripts only to see what they compute."""

from collections.abc import Iterator

import pytest

from tests.support.warm_scripts import WarmScripts


@pytest.fixture(scope="session")
def warm() -> Iterator[WarmScripts]:
    scripts = WarmScripts()
    yield scripts
    scripts.close()
