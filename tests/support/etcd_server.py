"""A real etcd for a test: started in the test's own folder, killed, paused and restarted at will.

The program is the one named in DTRAIN_ETCD_BINARY, else the one that ``make`` unpacked beside the virtual
environment, else the one that dtrain itself would take.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dtrain.etcd.binaries import find_etcd, find_etcdctl
from dtrain.etcd.embedded import EmbeddedEtcd

READY_S = 60.0  # a shared machine may be very busy; a healthy start takes a quarter of a second


def etcd_binary() -> Path:
    return find_etcd() if "DTRAIN_ETCD_BINARY" in os.environ else _unpacked("etcd") or find_etcd()


def etcdctl_binary() -> Path:
    return find_etcdctl() if "DTRAIN_ETCDCTL_BINARY" in os.environ else _unpacked("etcdctl") or find_etcdctl()


def _unpacked(program: str) -> Path | None:
    path = Path(sys.prefix) / "etcd" / "usr" / "bin" / program
    return path if path.is_file() else None


class EtcdServer(EmbeddedEtcd):
    """An embedded etcd that can also be treated badly. Data and ports survive a kill."""

    def __init__(self, folder: Path, *, options: Sequence[str] = ()) -> None:
        super().__init__(folder, log_path=folder / "etcd.log", binary=etcd_binary(), options=options)

    async def up(self) -> None:
        """Start it, if it does not run, and wait until it answers."""
        self.start()
        await self.wait_ready(READY_S)

    def kill(self) -> None:
        """End it with -9 and wait for its end."""
        self._signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def pause(self) -> None:
        """Freeze it: connections stay open and nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        if self.alive():
            self.resume()  # a frozen process hears no other signal
        super().stop()

    def _signal(self, number: signal.Signals) -> None:
        assert self.alive(), "etcd does not run"
        assert self.pid is not None
        os.kill(self.pid, number)


@contextmanager
def etcd_server(folder: Path, *, options: Sequence[str] = ()) -> Iterator[EtcdServer]:
    """A ready etcd with its data in ``folder``; stopped at the end. Not from within a running event loop."""
    server = EtcdServer(folder, options=options)
    try:
        asyncio.run(server.up())
        yield server
    finally:
        server.stop()
