"""etcd as a child of this process: the default of runs on one machine, where nobody has set up a cluster.

- It listens on 127.0.0.1 only, syncs to disk before it acknowledges, and dies with its parent, so a killed run
  leaves no server behind. The data folder is all that stays, and a later start goes on from it.
- Its ports are free ones, remembered in the data folder: a restart uses the same if they are still free, so
  that clients of before find it again.
- It has a session of its own: Ctrl-C in a terminal reaches the parent alone, which then ends things in order.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dtrain.common.errors import PermanentError, RetryableError, UserError
from dtrain.etcd import bound_to_parent
from dtrain.etcd.binaries import find_etcd, find_etcdctl
from dtrain.etcd.client import EtcdClient
from dtrain.etcd.probes import known_lossy, probe

__all__ = ["EmbeddedEtcd", "find_etcd", "find_etcdctl", "known_lossy", "probe"]

QUOTA_BYTES = 2 * 1024**3  # some 7 million events; etcd keeps the whole file mapped
COMPACTION_RETENTION = "1h"  # old versions of re-put keys are worth nothing to dtrain after that
# A member without peers still waits one to ten heartbeats before it elects itself: 20 to 200 ms, where etcd's own
# default for networks makes each start last up to a second.
HEARTBEAT_MS = 20
# etcd 3.5.0 to 3.5.2 write how far they are into the database before the change itself; a commit by the clock between
# the two, then a kill, and the change is skipped at the next start. So commits come by count only, which happens
# behind a whole change: nothing else is given up, because an answer waits for the synced log, not for the database.
COMMIT_INTERVAL = "24h"
COMMIT_CHANGES = 10_000  # as etcd itself; replayed from the log at worst after a kill, within tenths of a second
_READY_POLL_S = 0.02
_READY_ATTEMPT_S = 1.0  # one question to a starting etcd waits at most this long
_IN_USE_GRACE_S = 2.0  # the etcd of a run that was just killed may hold its files for a moment
_STOP_S = 5.0  # etcd ends within tenths of a second when asked; after this it is killed, which loses nothing
_PORT_ATTEMPTS = 5  # a port that was free may be taken by another before etcd binds it
_LOG_TAIL_BYTES = 64 * 1024


class EmbeddedEtcd:
    """One etcd of one member. Order of calls: start, wait_ready, any number of alive; stop.

    ``binary`` overrules where the program is looked for; ``options`` are appended to etcd's own arguments,
    where a later one wins.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        client_port: int | None = None,
        peer_port: int | None = None,
        log_path: Path,
        binary: Path | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self._data_dir = data_dir
        self._log_path = log_path
        self._binary = binary
        self._options = tuple(options)
        self._wanted_ports = (client_port, peer_port)
        self._ports = (0, 0)  # client, peer; 0 before the first start
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0  # size of the log file, bytes, when this process was started

    @property
    def endpoint(self) -> str:
        """``host:port`` for clients. Final once :meth:`wait_ready` has returned."""
        return f"127.0.0.1:{self._ports[0]}"

    @property
    def pid(self) -> int | None:
        """Process id while it runs or has not been waited for; None before the start."""
        return None if self._process is None else self._process.pid

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start etcd and return at once. Call it from a thread that outlives etcd. No effect while it is alive."""
        if self.alive():
            return
        binary = self._binary or find_etcd()
        try:
            self._data_dir.mkdir(parents=True, exist_ok=True)
            self._log_path.parent.mkdir(parents=True, exist_ok=True)
            self._ports = self._choose_ports()
            log = self._log_path.open("ab")
        except OSError as error:
            raise UserError(
                f"etcd's data cannot be kept in {self._data_dir} ({error.strerror}): name a folder that can be written."
            ) from error
        with log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-I",
                    "-S",
                    bound_to_parent.__file__,
                    str(os.getpid()),
                    str(binary),
                    *self._arguments(),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(),
                start_new_session=True,
            )

    async def wait_ready(self, deadline_s: float) -> str:
        """Wait until etcd answers a read that needs its leader; return its version.

        ``deadline_s`` is how many seconds that may take. Raises :class:`UserError` when the data folder is in
        use, when etcd ended, or when time is up; etcd is stopped then.
        """
        end = time.monotonic() + deadline_s
        in_use_end = min(end, time.monotonic() + _IN_USE_GRACE_S)
        port_attempts = 1
        try:
            while True:
                if not self.alive():
                    tail = self._log_tail()
                    if not self._worth_other_ports(tail) or port_attempts == _PORT_ATTEMPTS:
                        raise UserError(self._ended_text(tail))
                    port_attempts += 1
                    self.start()
                version = await self._ask(min(_READY_ATTEMPT_S, max(_READY_POLL_S, end - time.monotonic())))
                if version is not None and self.alive():
                    self._remember_ports()
                    return version
                if time.monotonic() >= in_use_end:
                    self._refuse_if_in_use()
                if time.monotonic() >= end:
                    raise UserError(
                        f"etcd did not start within {deadline_s:g} s: see its log, {self._log_path}, for the reason."
                    )
                await asyncio.sleep(_READY_POLL_S)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End etcd and wait for it. What it acknowledged stays in the data folder. No effect if it has ended."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()

    # -- inside ----------------------------------------------------------------------------------------

    @property
    def _store_dir(self) -> Path:
        return self._data_dir / "store"

    @property
    def _ports_path(self) -> Path:
        return self._data_dir / "ports.json"

    def _arguments(self) -> list[str]:
        client_url, peer_url = (f"http://127.0.0.1:{port}" for port in self._ports)
        return [
            "--name=embedded",
            f"--data-dir={self._store_dir}",
            f"--listen-client-urls={client_url}",
            f"--advertise-client-urls={client_url}",
            f"--listen-peer-urls={peer_url}",
            f"--initial-advertise-peer-urls={peer_url}",
            f"--initial-cluster=embedded={peer_url}",
            f"--heartbeat-interval={HEARTBEAT_MS}",
            f"--election-timeout={10 * HEARTBEAT_MS}",
            "--auto-compaction-mode=periodic",
            f"--auto-compaction-retention={COMPACTION_RETENTION}",
            f"--quota-backend-bytes={QUOTA_BYTES}",
            f"--backend-batch-interval={COMMIT_INTERVAL}",
            f"--backend-batch-limit={COMMIT_CHANGES}",
            "--logger=zap",
            "--log-level=warn",
            "--log-outputs=stderr",
            *self._options,
        ]

    def _choose_ports(self) -> tuple[int, int]:
        remembered = _read_ports(self._ports_path)
        chosen: list[int] = []
        for wanted, before in zip(self._wanted_ports, remembered, strict=True):
            if wanted is not None:
                chosen.append(wanted)
            elif before and before not in chosen and _is_free(before):
                chosen.append(before)
            else:
                chosen.append(_free_port())
        return chosen[0], chosen[1]

    def _remember_ports(self) -> None:
        # Only once etcd is ready: a start that is refused must not overwrite the ports of the one that runs.
        partial = self._ports_path.with_suffix(".partial")
        partial.write_text(json.dumps({"client": self._ports[0], "peer": self._ports[1]}))
        partial.replace(self._ports_path)

    async def _ask(self, timeout_s: float) -> str | None:
        try:
            async with EtcdClient([self.endpoint], timeout_s=timeout_s) as client:
                status = await client.status()
                if not status.has_leader:
                    return None  # a read would now wait inside etcd, longer than the election takes
                await client.get("ready")
                return status.version
        except (RetryableError, PermanentError):
            return None

    def _refuse_if_in_use(self) -> None:
        holder = _lock_holder(self._store_dir / "member" / "snap" / "db")
        if holder is not None and holder != self.pid:
            raise UserError(
                f"the data folder {self._data_dir} is in use by another etcd (process {holder}): "
                "end the run it belongs to, or name another folder."
            )

    def _log_tail(self) -> str:
        with self._log_path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - _LOG_TAIL_BYTES))
            return log.read().decode(errors="replace")

    def _worth_other_ports(self, tail: str) -> bool:
        """Whether etcd ended for want of a port that was ours to choose: another process was quicker."""
        asked_for = [port for port in self._wanted_ports if port is not None]
        return "address already in use" in tail and all(_is_free(port) for port in asked_for)

    def _ended_text(self, tail: str) -> str:
        if "address already in use" in tail:
            return (
                f"etcd cannot listen on ports {self._ports[0]} and {self._ports[1]}, "
                "which are in use: end what uses them, or name other ports."
            )
        code = None if self._process is None else self._process.returncode
        return f"etcd ended while it started (exit status {code}): see its log, {self._log_path}, for the reason."


def _environment() -> dict[str, str]:
    # etcd reads every option from ETCD_* as well; what someone set for another etcd must not bend this one.
    return {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}


def _read_ports(path: Path) -> tuple[int, int]:
    """Return the (client, peer) ports of the last start, zeros if they are not known."""
    try:
        ports = json.loads(path.read_text())
        return int(ports["client"]), int(ports["peer"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0  # a convenience only: with the file gone or torn, new ports do as well


def _is_free(port: int) -> bool:
    with socket.socket() as probe_socket:
        # As etcd's own socket does, so that connections lingering from its last life do not count.
        probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe_socket.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _free_port() -> int:
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        return int(probe_socket.getsockname()[1])


def _lock_holder(path: Path) -> int | None:
    """Return the id of a process that holds a lock on the file, as the kernel lists it; None if none does."""
    try:
        status = path.stat()
        listing = Path("/proc/locks").read_text()
    except OSError:
        return None
    file_id = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in listing.splitlines():
        # "1: FLOCK  ADVISORY  WRITE 12345 fd:01:67890 0 EOF"; a waiter's line has "->" in the second place.
        fields = line.split()
        if len(fields) >= 6 and fields[1] != "->" and fields[5] == file_id:
            return int(fields[4])
    return None
