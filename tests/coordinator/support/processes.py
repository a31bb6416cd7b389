"""Coordinators as real processes, to be killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.coordinator.support.clusters import PREFIX

END_S = 30.0


class CoordinatorProcess:
    """`dtrain coordinator` on a free port. Killed at the end of its context, if it still runs."""

    def __init__(self, etcd: str, folder: Path, name: str = "coordinator") -> None:
        self._command = [sys.executable, "-m", "dtrain", "coordinator", "--etcd", etcd, "--prefix", PREFIX]
        self._command += ["--listen", "127.0.0.1:0", "--identity", name]
        self._log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            self.resume()
            self.kill()
        if error is not None:
            sys.stderr.write(self.said()[-6000:])

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def kill(self) -> None:
        """End it with -9 and wait for its end."""
        self._signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def terminate(self) -> int:
        self._signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Wait for its end; return its exit code."""
        assert self._process is not None
        return self._process.wait(END_S)

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)
