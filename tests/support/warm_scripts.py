"""Runs scripts in forks of a process that has imported torch: some tests start dozens, and importing takes seconds.

For tests of what a script computes and stores. How trainers begin and end is tested with real starts.

For each script the server forks a minder, which forks the script, tells its pid and, once it has ended, its status.
The minder takes it out of the process table only when its client has heard: until then the pid is no other's.
"""

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from tests.support.facts import wait_for

MODULES = (
    *("numpy.random", "safetensors.torch", "torch", "torch.distributed", "torch._dynamo"),
    *("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.nn.parallel", "torch.optim"),
    *("dtrain.trainer.run", "dtrain.trainer.supervised"),
)  # not what a test wants to see imported by need only: torch.distributed.checkpoint
MESSAGE_BYTES = 1 << 18
ROOT = Path(__file__).parents[2]


class WarmScript:
    """A script that was started; as :class:`subprocess.Popen` would have it."""

    def __init__(self, minder: socket.socket) -> None:
        self._minder = minder
        self.pid = int(minder.recv(MESSAGE_BYTES))
        self.returncode: int | None = None
        minder.setblocking(False)

    def poll(self) -> int | None:
        """Exit code, minus the signal's number, or None while it runs."""
        if self.returncode is None:
            try:
                status = self._minder.recv(MESSAGE_BYTES)
            except BlockingIOError:
                return None
            self.returncode = int(status)
            self._minder.close()
        return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        """Return the exit code once it has ended."""
        wait_for(f"the end of process {self.pid}", lambda: self.poll() is not None, deadline_s=timeout)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        """End it by SIGKILL, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class WarmScripts:
    """The server's client. Closing it ends the server, and no script."""

    def __init__(self) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-m", __name__, str(its.fileno())]
            self._server = subprocess.Popen(command, env=environment, pass_fds=(its.fileno(),))
        self._control = ours

    def start(self, script: Path, *arguments: str, environment: Mapping[str, str], output: Path) -> WarmScript:
        """Start ``python script *arguments``; what it prints goes to the file ``output``."""
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = json.dumps({"argv": [str(script), *arguments], "env": dict(environment), "output": str(output)})
        with its:
            socket.send_fds(self._control, [request.encode()], [its.fileno()])
        return WarmScript(ours)

    def close(self) -> None:
        self._control.close()
        self._server.wait()


def _serve(control: socket.socket) -> None:
    for module in MODULES:
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # minders are waited for by nobody
    while True:
        text, descriptors, _, _ = socket.recv_fds(control, MESSAGE_BYTES, 1)
        if not text:
            return
        with socket.socket(fileno=descriptors[0]) as client:
            if not os.fork():
                control.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _mind(client, json.loads(text))


def _mind(client: socket.socket, request: dict[str, object]) -> None:
    """Run the script in a child, and leave with it in the child only."""
    pid = os.fork()
    if not pid:
        client.close()
        _become(request)
    client.send(str(pid).encode())
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
    client.send(str(code).encode())
    client.recv(1)  # until it is closed
    os.waitpid(pid, 0)
    os._exit(0)


def _become(request: dict[str, object]) -> NoReturn:
    argv, environment = request["argv"], request["env"]
    assert isinstance(argv, list) and isinstance(environment, dict)
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(str(request["output"]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for descriptor in (sys.stdout.fileno(), sys.stderr.fileno()):
        os.dup2(output, descriptor)
    os.close(output)
    sys.argv = argv
    sys.path[0] = str(Path(argv[0]).parent)
    runpy.run_path(argv[0], run_name="__main__")
    sys.exit(0)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
