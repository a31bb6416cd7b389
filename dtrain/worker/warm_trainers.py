"""Turns a process that was forked from the zygote into ``python -u script.py``, as if it had been executed.

A script must not notice the difference, so whatever the interpreter or a library reads at its start, and whatever
was remembered from the zygote's life, is either put right here or is a reason for a cold start: the process then
executes the interpreter after all. ``why_cold`` finds these reasons; it looks, and changes nothing.

Known differences that stay: a frame of the zygote lies below the script's first, and a module of the script's that
sets a variable for a library's start comes too late. (What the script itself sets is seen in its text.)
"""

# Names as the interpreter itself makes them, down to a "./", are what this file is about:
# ruff: noqa: PTH109, PTH112, PTH113, PTH116, PTH117, PTH118, PTH119, PTH120, PTH123
import builtins
import gc
import importlib.machinery
import os
import shutil
import stat
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dtrain.common.scripts import names_torch
from dtrain.worker import late_settings
from dtrain.worker.exec_memory import show_arguments, show_environment

# Read once, by a library when it is loaded. A zygote can be given what a job wants of these.
READ_BY_LIBRARIES = (
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "GOTO_", "BLIS_", "NPY_", "NUMPY_"),
    *("TORCH", "PYTORCH_", "ATEN_", "C10_", "KINETO_", "LOGLEVEL"),
    *("ONEDNN_", "DNNL_", "MKLDNN_"),
    # Settings of torch.compile, and of what it is built on.
    *("INDUCTOR_", "AOT_", "AOTINDUCTOR_", "PARTITIONER_", "PT2_", "FX_", "SYMPY_", "MPMATH_", "CXX"),
)
# Read once, by them or by the dynamic loader, the C library or the interpreter: what is wrong there harms the zygote.
READ_AT_START = ("LD_", "GLIBC_", "MALLOC_", "PYTHON", "LC_", *READ_BY_LIBRARIES)
# HOME leads to the user's site-packages.
READ_AT_START_NAMES = frozenset({"LANG", "LANGUAGE", "HOME", "OPENSSL_CONF"})
READ_LATER = ("TORCHELASTIC_", "TORCH_NCCL_", "TORCHINDUCTOR_CACHE_DIR")  # or put right by ``become``
THREADS = "OMP_NUM_THREADS"
SITE_FOLDERS = ("site-packages", "dist-packages")

Plan = Mapping[str, Any]  # keeper.json, as JSON gives it
Settle = Callable[[Mapping[str, str]], None]


class Origin:
    """What the zygote was when it began to serve: what a warm trainer has to match."""

    def __init__(self, *, environment: Mapping[str, str], cold_modules: frozenset[str]) -> None:
        self.environment = dict(environment)
        self.cold_modules = cold_modules  # what any interpreter has imported before it runs a script
        self._installed = _installed()

    def why_cold(self, plan: Plan) -> str:
        """Say why this trainer needs an interpreter of its own; empty if it does not."""
        argv, environment = plan["argv"], plan["env"]
        if not _is_this_interpreter(argv[0], environment):
            return f"{argv[0]} is another program than the worker's interpreter"
        if len(argv) < 3 or argv[1] != "-u" or argv[2].startswith("-") or not _is_source(argv[2]):
            return "it is not started from a Python file"
        for name in sorted(environment.keys() | self.environment.keys()):
            if _is_read_at_start(name) and environment.get(name) != self.environment.get(name):
                return f"{name} differs from the worker's, and is read when a process starts"
        if path := _unfinished(environment.get("PYTHONPATH", "")):
            return f"PYTHONPATH has the entry {path!r}, which is another folder where the script runs"
        threads = environment.get(THREADS, "1")
        if not (threads.isascii() and threads.isdecimal() and int(threads) > 0):
            return f"{THREADS} is {threads!r}, and is read when a process starts"
        if self.is_outdated():
            return "packages were installed or removed since the worker loaded them"
        if name := _set_too_late(argv[2]):
            return f"the script sets {name}, which is read when a library is loaded"
        if shadowed := self._shadowed(_script_folder(argv[2])):
            return f"{shadowed} beside the script has the name of a module that is loaded already"
        return ""

    def is_outdated(self) -> bool:
        """Whether what was imported may not be what an import would give now."""
        return self._installed != _installed()

    def _shadowed(self, folder: str) -> str:
        """A file beside the script that an import would take, had the zygote not imported its namesake before."""
        if sys.flags.safe_path:
            return ""
        for entry in os.scandir(folder):
            name, _, suffix = entry.name.partition(".")
            if name not in sys.modules or name in self.cold_modules:
                continue
            if suffix and f".{suffix}" not in importlib.machinery.all_suffixes():
                continue
            if not suffix and not os.path.isfile(os.path.join(entry.path, "__init__.py")):
                continue
            spec = getattr(sys.modules[name], "__spec__", None)
            if not str(getattr(spec, "origin", "")).startswith(folder.rstrip("/") + "/"):
                return entry.name
        return ""


def _unfinished(python_path: str) -> str | None:
    """An entry that an interpreter completes by the folder in which it starts; None if there is none."""
    entries = python_path.split(os.pathsep) if python_path else ()
    return next((entry or "." for entry in entries if not os.path.isabs(entry)), None)


def is_worth_a_wait(plan: Plan, environment: Mapping[str, str]) -> bool:
    """Whether this trainer is better off with a process that is about to have imported torch in ``environment``.

    A first look, by the agent: the trainer itself looks closer before it begins (``why_cold``).
    """
    argv = plan["argv"]
    return (
        len(argv) >= 3
        and argv[1] == "-u"
        and needs_of(plan["env"]) == needs_of(environment)
        and _is_this_interpreter(argv[0], plan["env"])
        and names_torch(Path(plan["cwd"], argv[2]))
    )


def _set_too_late(script: str) -> str:
    try:
        return late_settings.set_by(Path(script).read_text(), lambda name: name == THREADS or _is_a_need(name))
    except (SyntaxError, ValueError, RecursionError):  # the interpreter will say so
        return ""


def needs_of(environment: Mapping[str, str]) -> dict[str, str]:
    """What a zygote must have in its environment to serve a job that sets these variables."""
    return {name: value for name, value in environment.items() if _is_a_need(name)}


def become(plan: Plan, settle: Settle) -> tuple[types.CodeType, dict[str, Any]]:
    """Make this process the trainer; return what is left to do: the script's code, and the space to run it in.

    Raises SyntaxError, as the script's own.
    """
    argv, environment = plan["argv"], plan["env"]
    os.environ.clear()
    os.environ.update(environment)
    show_arguments(argv)
    time.tzset()
    _refresh_multiprocessing()
    tempfile.tempdir = None  # chosen by the zygote's environment, if anybody asked
    threading.main_thread()._set_native_id()  # type: ignore[attr-defined]
    settle(environment)
    gc.enable()
    sys.orig_argv[:] = argv
    sys.argv[:] = argv[2:]
    if not sys.flags.safe_path:
        sys.path.insert(0, _script_folder(argv[2]))
    path = _as_interpreter_names(argv[2])
    main = types.ModuleType("__main__")
    main.__dict__.update(
        __annotations__={},
        __builtins__=builtins,
        __cached__=None,
        __file__=path,
        __loader__=importlib.machinery.SourceFileLoader("__main__", path),
    )
    sys.modules["__main__"] = main
    source = Path(path).read_bytes()
    return compile(source, path, "exec", dont_inherit=True), main.__dict__


def can_show(plan: Plan) -> bool:
    """Show the trainer's environment to whoever looks for its mark; return whether it fits."""
    return show_environment(plan["env"])


def hide_frames(code: types.CodeType | None) -> None:
    """Have tracebacks of the exception under way begin with the script's first frame, as the interpreter's do."""
    inner = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        while trace is not None and trace.tb_frame.f_code is not code:
            trace = trace.tb_next
        error.__traceback__ = trace
        sys.excepthook = inner
        inner(kind, error, trace)

    sys.excepthook = hook


def _is_a_need(name: str) -> bool:
    return name.startswith(READ_BY_LIBRARIES) and _is_read_at_start(name)


def _is_read_at_start(name: str) -> bool:
    if name == THREADS or name.startswith(READ_LATER):
        return False
    return name in READ_AT_START_NAMES or name.startswith(READ_AT_START)


def _is_this_interpreter(program: str, environment: Mapping[str, str]) -> bool:
    """Whether it is the same file in the same folder: a virtual environment is known by where its link lies."""
    found = shutil.which(program, path=environment.get("PATH"))
    if found is None:
        return False
    same_folder = os.path.realpath(os.path.dirname(found)) == os.path.realpath(os.path.dirname(sys.executable))
    return same_folder and os.path.realpath(found) == os.path.realpath(sys.executable)


def _is_source(script: str) -> bool:
    """Whether the interpreter would read it as source text: it runs folders, archives and bytecode in other ways."""
    try:
        with open(script, "rb") as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            return regular and not script.endswith(".pyc") and b"\0" not in file.read(4096)
    except OSError:
        return False


def _script_folder(script: str) -> str:
    return os.path.dirname(os.path.realpath(script))


def _as_interpreter_names(script: str) -> str:
    if os.path.isabs(script):
        return script
    return os.path.join(os.getcwd(), script)


def _installed() -> dict[str, int]:
    """When the folders of installed packages last changed: an upgrade under a living zygote must not be mixed in."""
    folders = [path for path in sys.path if os.path.basename(path) in SITE_FOLDERS]
    return {path: os.stat(path).st_mtime_ns for path in folders if os.path.isdir(path)}


def _refresh_multiprocessing() -> None:
    """What multiprocessing remembers from its import: the folder that a script is found from, and a secret key."""
    if (process := sys.modules.get("multiprocessing.process")) is not None:
        vars(process)["ORIGINAL_DIR"] = os.getcwd()
        process.current_process().authkey = os.urandom(32)
