"""A warm start against a cold one: the same script says the same, and what a fork could get wrong is right."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.worker import keeper
from dtrain.worker.keepers import mark_of
from dtrain.worker.rank_dirs import read_started
from dtrain.worker.warm_trainers import Origin
from dtrain.worker.zygote import NICENESS, SESSION_NICENESS
from tests.worker.nodes import alive
from tests.worker.nursery import TRAINER_MARK, WAITS, Nursery, nursery_in

SAME = {
    "what the script sees of itself": (
        "import sys, os\n"
        "print(sorted(globals()), __name__, __file__, __spec__, __package__, __doc__, type(__loader__).__name__)\n"
        "print(sys.argv, sys.orig_argv, sys.path, sys.flags, sys.executable, os.getcwd(), __builtins__)\n"
        "import __main__; print(__main__.__file__, vars(__main__) is globals())"
    ),
    "the environment, in Python and in the C library": (
        "import ctypes, os\nprint(sorted(os.environ.items()))\n"
        "getenv = ctypes.CDLL(None).getenv; getenv.restype = ctypes.c_char_p\n"
        "print(getenv(b'DTRAIN_TRAINER'), getenv(b'_DTRAIN_PADDING'), getenv(b'PATH'))"
    ),
    "a traceback": "def f():\n    raise ValueError('no luck')\n\nf()",
    "a traceback with a cause": "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise KeyError(1) from e",
    "a syntax error": "x = = 1",
    "an exit by number": "import sys; sys.exit(7)",
    "an exit by text": "import sys; sys.exit('enough')",
    "an exit without a word": "raise SystemExit",
    "a kill, and what was said before it": "import os\nprint('half a line', end='')\nos.kill(os.getpid(), 9)",
    "a hook of the script's own": (
        "import sys\nsys.excepthook = lambda k, e, t: print('hook', k, e, t.tb_lineno, t.tb_next)\n1 / 0"
    ),
    "threads are waited for, then atexit runs, then streams are flushed": (
        "import atexit, sys, threading\natexit.register(print, 'atexit')\n"
        "threading.Thread(target=lambda: (sys.stdin.read(), sys.stdout.write('thread\\n'))).start()"
    ),
    "signals": (
        "import signal\nprint([signal.getsignal(s) for s in signal.valid_signals()])\n"
        "print(signal.pthread_sigmask(signal.SIG_BLOCK, []), signal.set_wakeup_fd(-1))"
    ),
    "open files": (
        "import os\nprint(len(os.listdir('/proc/self/fd')), os.fstat(0).st_rdev == os.stat(os.devnull).st_rdev)"
    ),
    "streams": (
        "import sys\nfor s in (sys.stdin, sys.stdout, sys.stderr):\n"
        "    print(s.encoding, s.errors, s.line_buffering, s.write_through)"
    ),
    "priority and identity": (
        "import os, threading\nprint(os.getpriority(os.PRIO_PROCESS, 0), os.getsid(0) == os.getpid(),\n"
        "      threading.main_thread().native_id == os.getpid(), threading.active_count())"
    ),
    "torch's threads": (
        "import torch\nprint(torch.get_num_threads(), torch.get_num_interop_threads())\n"
        "print(torch.cuda.is_available(), torch.cuda.is_initialized())"
    ),
    "modules that a script may import": "import torch, dtrain, __main__\nprint(torch.__version__, dtrain.__version__)",
    "a pool that spawns and a loader that forks": (
        "import multiprocessing as m, os, torch\nfrom torch.utils.data import DataLoader\n\n"
        "def square(x):\n    return x * x, os.path.basename(__file__), __name__ == '__mp_main__'\n\n"
        "if __name__ == '__main__':\n"
        "    with m.get_context('spawn').Pool(2) as pool: print(pool.map(square, range(4)))\n"
        "    for context in ('fork', 'spawn'):\n"
        "        loader = DataLoader(torch.arange(8), batch_size=4, num_workers=2, multiprocessing_context=context)\n"
        "        print([batch.tolist() for batch in loader])\n"
    ),
    "parallel work in torch": (
        "import torch\ntorch.manual_seed(0); a = torch.randn(400, 400)\n"
        "print((a @ a).sum().item(), torch.nn.functional.softmax(a, 0).sum().item())\n"
        "m = torch.nn.Linear(400, 400); m(a).sum().backward(); print(m.weight.grad.norm().item())"
    ),
}
SESSION = ("priority and identity",)  # run cold, the test's own session is seen


@pytest.mark.parametrize("what", SAME)
def test_a_warm_script_says_what_a_cold_one_says(nursery: Nursery, what: str) -> None:
    # Another number of threads than the zygote was loaded with.
    rank = nursery.rank(SAME[what], "one", "-two", env={"OMP_NUM_THREADS": "2"})
    code, said = rank.end()
    cold_code, cold_said = rank.cold()
    if what in SESSION:
        cold_said = cold_said.replace("False", "True")
    assert (code, said) == (cold_code, cold_said)


def test_a_relative_script_is_named_as_the_interpreter_names_it(nursery: Nursery) -> None:
    rank = nursery.rank("print(__file__)\nraise ValueError", argv=[sys.executable, "-u", "./script.py"])
    assert rank.end() == rank.cold()


def test_an_interrupt_ends_it_by_the_signal(nursery: Nursery) -> None:
    assert nursery.rank("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nwhile True: pass").end()[0] == -2


def test_a_script_that_is_not_there_is_said_by_the_interpreter(nursery: Nursery) -> None:
    code, said = nursery.rank("", argv=[sys.executable, "-u", "/no/such.py"]).end()
    assert code == 2
    assert "can't open file '/no/such.py'" in said


RANDOM = (
    "import random, numpy, torch, tempfile, uuid, multiprocessing as m, torch.cuda\n"
    "print(random.random(), numpy.random.rand(), torch.rand(1).item(), m.current_process().authkey.hex())"
)


def test_no_two_trainers_draw_the_same_random_numbers(nursery: Nursery) -> None:
    first, second = (nursery.rank(RANDOM).end()[1].split() for _ in range(2))
    assert len(first) == 4
    assert not set(first) & set(second)


COLD = {
    "another interpreter": (
        {},
        ["/no/such/python3", "-u", "script.py"],
        "another program than the worker's interpreter",
    ),
    "no interpreter": ({}, ["/bin/sh", "-c", "echo ran"], "another program than the worker's interpreter"),
    "LD_PRELOAD": ({"LD_PRELOAD": "libm.so.6"}, None, "LD_PRELOAD differs"),
    "PYTHONHASHSEED": ({"PYTHONHASHSEED": "1"}, None, "PYTHONHASHSEED differs"),
    "PYTHONPATH": ({"PYTHONPATH": "/x"}, None, "PYTHONPATH differs"),
    "GLIBC_TUNABLES": ({"GLIBC_TUNABLES": "glibc.malloc.perturb=1"}, None, "GLIBC_TUNABLES differs"),
    "ONEDNN_DEFAULT_FPMATH_MODE": (
        {"ONEDNN_DEFAULT_FPMATH_MODE": "BF16"},
        None,
        "ONEDNN_DEFAULT_FPMATH_MODE differs",
    ),
    "TORCH_LOGS": ({"TORCH_LOGS": "+dynamo"}, None, "TORCH_LOGS differs"),
    "threads by level": ({"OMP_NUM_THREADS": "2,1"}, None, "OMP_NUM_THREADS is '2,1'"),
    "no file": ({}, [sys.executable, "-u", "-c", "print('ran')"], "not started from a Python file"),
    "a long environment": ({"LONG": "x" * 100_000}, None, "longer than there is room for"),
}


@pytest.mark.parametrize("why", COLD)
def test_what_the_zygote_cannot_serve_starts_cold_and_the_log_says_why(nursery: Nursery, why: str) -> None:
    env, argv, words = COLD[why]
    code, said = nursery.rank("import sys; print('ran', 'torch' in sys.modules)", env=env, argv=argv).end()
    first, _, rest = said.partition("\n")
    assert first.startswith("dtrain: a cold start: ")
    assert words in first
    if argv is None:
        assert (code, rest) == (0, "ran False\n")


def test_a_script_that_sets_what_a_library_reads_when_it_is_loaded_starts_cold(nursery: Nursery) -> None:
    script = "import os, sys\nos.environ['OMP_NUM_THREADS'] = '1'\nprint('ran', 'torch' in sys.modules)"
    code, said = nursery.rank(script).end()
    assert (code, said.splitlines()[-1]) == (0, "ran False")
    assert said.startswith("dtrain: a cold start: the script sets OMP_NUM_THREADS")


@pytest.mark.parametrize("path", ["src", "/lib::/usr", "/lib:src", "./x"])
def test_a_python_path_that_depends_on_the_folder_is_no_warm_processs(path: str, tmp_path: Path) -> None:
    """The zygote stands in another folder, where the same words mean other places."""
    (tmp_path / "script.py").write_text("")
    plan = {"argv": [sys.executable, "-u", str(tmp_path / "script.py")], "env": {"PYTHONPATH": path}}
    why = Origin(environment={"PYTHONPATH": path}, cold_modules=frozenset()).why_cold(plan)
    assert "PYTHONPATH has the entry" in why
    plan["env"] = {"PYTHONPATH": "/lib:/usr"}
    assert "entry" not in Origin(environment={"PYTHONPATH": "/lib:/usr"}, cold_modules=frozenset()).why_cold(plan)


def test_temporary_files_of_a_warm_rank_go_where_its_environment_says(nursery: Nursery, tmp_path: Path) -> None:
    code, said = nursery.rank("import tempfile; print(tempfile.gettempdir())", env={"TMPDIR": str(tmp_path)}).end()
    assert (code, said) == (0, f"{tmp_path}\n")


def test_debug_files_of_a_warm_rank_go_where_a_cold_one_puts_them(nursery: Nursery) -> None:
    """In every thread: torch keeps what a script sets for the thread that set it."""
    script = (
        "import threading, torch._dynamo.config as config\ndef say(): print(config.debug_dir_root)\n"
        "say(); threading.Thread(target=say).start()"
    )
    rank = nursery.rank(script)
    code, said = rank.end()
    assert (code, said) == rank.cold()
    assert said.startswith(f"{rank.place}/")


def test_a_module_beside_the_script_is_never_hidden_by_a_preloaded_one(nursery: Nursery) -> None:
    rank = nursery.rank("import safetensors; print(safetensors.WHOSE)")
    (rank.place / "safetensors.py").write_text("WHOSE = 'mine'")
    code, said = rank.end()
    assert code == 0, said
    assert said.endswith("mine\n")
    assert "safetensors.py beside the script" in said


def test_a_trainer_carries_its_mark_and_so_does_what_it_starts_but_its_keeper_does_not(nursery: Nursery) -> None:
    rank = nursery.rank(
        "import os\nif os.fork() == 0: print('child', os.getpid())\nimport time; time.sleep(600)"
    ).fork()
    started = rank.started()
    rank.said("child")
    child = int(rank.log().split()[1])
    assert mark_of(started.trainer_pid) == TRAINER_MARK
    assert mark_of(child) == TRAINER_MARK
    assert mark_of(started.keeper_pid) == ""
    assert mark_of(nursery.zygotes.pid) == ""
    os.kill(started.keeper_pid, signal.SIGKILL)
    nursery.until("the trainer died with its keeper", lambda: not alive(started.trainer_pid))
    os.kill(child, signal.SIGKILL)


def test_the_lock_is_the_keepers_alone(nursery: Nursery) -> None:
    """A trainer that held it too would keep it when its keeper is gone."""
    started = nursery.rank(WAITS).fork().started()
    held = {str(fd.readlink()) for fd in Path(f"/proc/{started.trainer_pid}/fd").iterdir()}
    assert not any("keeper.lock" in path or "socket" in path or "pidfd" in path for path in held), held
    os.kill(started.keeper_pid, signal.SIGQUIT)
    nursery.until("the keeper is gone", lambda: not alive(started.keeper_pid))


def test_a_second_keeper_leaves_at_once(nursery: Nursery) -> None:
    rank = nursery.rank(WAITS).fork()
    started = rank.started()
    second = subprocess.run([sys.executable, "-I", "-S", keeper.__file__, str(rank.folder)], check=False)
    assert second.returncode == keeper.EXIT_USED
    rank.fork()
    assert nursery.rank("print('after it')").end() == (0, "after it\n")
    assert read_started(rank.folder) == started
    os.kill(started.keeper_pid, signal.SIGQUIT)
    nursery.until("the keeper is gone", lambda: not alive(started.keeper_pid))


def test_a_zygote_has_one_thread_and_ordinary_priority(nursery: Nursery) -> None:
    pid = nursery.ready()
    assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 1
    assert os.getpriority(os.PRIO_PROCESS, pid) == os.getpriority(os.PRIO_PROCESS, 0)


@pytest.mark.parametrize("others", [True, False], ids=["beside others", "while nobody is here"])
def test_a_zygote_gives_way_to_others_while_it_imports_and_its_trainers_never_do(tmp_path: Path, others: bool) -> None:
    def session_of(pid: int | str) -> str:  # "/autogroup-17 nice 0"; where the kernel weighs no sessions there is none
        file = Path(f"/proc/{pid}/autogroup")
        return file.read_text().rpartition(" ")[2].strip() if file.exists() else ""

    seen = tmp_path / "seen"
    source = f"""
import os, pathlib
def preload():
    autogroup = pathlib.Path("/proc/self/autogroup")
    session = autogroup.read_text().split()[-1] if autogroup.exists() else ""
    pathlib.Path({str(seen)!r}).write_text(f"{{os.getpriority(os.PRIO_PROCESS, 0)}} {{session}}")
def settle(environment): pass
"""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, start_new_session=True) as other:  # the tests' may have none
        ordinary = session_of(other.pid)
        other.communicate()
    own = (str(os.getpriority(os.PRIO_PROCESS, 0)), ordinary)
    with nursery_in(tmp_path, {"looking": source}, wanted=[{}] if others else []) as it:
        given_way = (str(NICENESS), str(SESSION_NICENESS) if ordinary else "")
        assert tuple(seen.read_text().split(" ")) == (given_way if others else own)
        assert session_of(it.ready()) == ordinary
        rank = it.rank(WAITS).fork()
        started = rank.started()
        for pid in (started.keeper_pid, started.trainer_pid):
            assert session_of(pid) == ordinary
        os.kill(started.keeper_pid, signal.SIGQUIT)
        it.until("the keeper is gone", lambda: not alive(started.keeper_pid))


def test_after_packages_were_installed_a_rank_starts_cold_and_the_zygote_is_replaced(nursery: Nursery) -> None:
    zygote = nursery.ready()
    (nursery.folder / "site-packages" / "new.py").write_text("")
    code, said = nursery.rank("import new; print('found it')").end()
    assert code == 0
    assert "packages were installed or removed" in said
    assert said.endswith("found it\n")
    nursery.until("another zygote", lambda: nursery.zygotes.is_ready and nursery.zygotes.pid != zygote)
    assert nursery.rank("import new; print('found it')").end() == (0, "found it\n")
