"""Rooms stay small: a file is one idea, a function fits a screen, and nothing is called utils."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70
GENERATED = ("_pb2.py", "_pb2_grpc.py")
SOURCES = {
    str(path.relative_to(ROOT)): path.read_text()
    for room in ("dtrain", "tests", "examples", "benchmarks")
    for path in sorted((ROOT / room).rglob("*.py"))
    if not path.name.endswith(GENERATED)
}


def test_files_are_one_idea() -> None:
    assert len(SOURCES) > 100
    assert {name: text.count("\n") for name, text in SOURCES.items() if text.count("\n") > FILE_LINES_MAX} == {}
    assert [name for name in SOURCES if Path(name).stem in ("utils", "util", "helpers", "misc")] == []


def test_functions_fit_a_screen() -> None:
    long = {}
    for name, text in SOURCES.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES_MAX:
                    long[f"{name}:{node.name}"] = lines
    assert long == {}


def test_every_module_says_what_it_is_for() -> None:
    silent = [name for name, text in SOURCES.items() if text.strip() and not ast.get_docstring(ast.parse(text))]
    assert [name for name in silent if name.startswith("dtrain/")] == []
