"""What a script sets in its environment before a library is loaded is found in its text."""

import pytest

from dtrain.worker.late_settings import set_by


def is_of_a_library(name: str) -> bool:
    return name.startswith(("OMP_", "MKL_"))


@pytest.mark.parametrize(
    "line",
    [
        "os.environ['OMP_NUM_THREADS'] = '1'",
        "environ['OMP_NUM_THREADS'] = '1'",
        "os.environ.setdefault('OMP_NUM_THREADS', '1')",
        "os.environ.update({'OMP_NUM_THREADS': '1'})",
        "os.environ.update(dict(A='x', OMP_NUM_THREADS='1'))",
        "os.environ.update(OMP_NUM_THREADS='1')",
        "os.environ |= {'A': 'x', 'OMP_NUM_THREADS': '1'}",
        "os.putenv('OMP_NUM_THREADS', '1')",
        "if True:\n    def f():\n        os.environ['OMP_NUM_THREADS'] = '1'",
    ],
)
def test_a_setting_is_found_however_it_is_made(line: str) -> None:
    assert set_by(f"import os\nfrom os import environ\n{line}\nimport torch\n", is_of_a_library) == "OMP_NUM_THREADS"


@pytest.mark.parametrize(
    "line",
    [
        "print(os.environ['OMP_NUM_THREADS'])",
        "threads = int(os.environ.get('OMP_NUM_THREADS', '1'))",
        "os.environ['OTHER'] = 'OMP_NUM_THREADS'",
        "settings['OMP_NUM_THREADS'] = '1'",
        "settings.update(OMP_NUM_THREADS='1')",
        "# os.environ['OMP_NUM_THREADS'] = '1'",
        "del os.environ['OMP_NUM_THREADS']",
    ],
)
def test_to_read_one_or_to_set_another_is_none(line: str) -> None:
    assert set_by(f"import os\n{line}\n", is_of_a_library) == ""


def test_of_two_the_one_that_counts_is_named() -> None:
    source = "import os\nos.environ['A'] = os.environ['MKL_X'] = '1'\n"
    assert set_by(source, is_of_a_library) == "MKL_X"
