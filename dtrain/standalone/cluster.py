"""A whole cluster on one machine, for as long as one run lasts.

The processes are the ones a real cluster has: etcd, a coordinator, one agent a node. Only their number and
their addresses differ, so what works here works there. They are started together, because each waits for
what it needs: the run's first step comes as early as the slowest of them allows.

Order of leaving: the coordinator first, so that trainers which are ended now are not recorded as failures;
then the workers, which end their trainers; then etcd; then whatever still carries the folder's mark. Nothing
is left. The log says nothing of the leaving: a run that was not over is taken over by the next one.
"""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from dtrain.common.errors import RetryableError, UserError
from dtrain.etcd.embedded import EmbeddedEtcd
from dtrain.standalone.children import MARK, end_leftovers
from dtrain.standalone.data_folder import DataFolder, Endpoints, FolderLock, lock_folder
from dtrain.standalone.supervision import YOUNG_DEATHS_MAX, Notice, Service, Supervisor, backoff_s

Result = TypeVar("Result")

ETCD_READY_S = 30.0  # a slow disk fsyncs for seconds; a healthy one answers within half a second
ETCD_POLL_S = 0.05  # between two looks at a living etcd, where the kernel offers no pidfd
ORPHAN_AFTER_S = 30.0  # a trainer without an agent ends after this: the supervisor restarts agents at once
UNSURE_AFTER_S = 2.0  # a warm process is begun so late where the script may not need it
WORKER_GRACE_S = 12.0  # a worker gives its trainers 5 s, then kills them
COORDINATOR_GRACE_S = 3.0  # it only has a lease to hand back


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPlan:
    """How large a cluster to bring up."""

    workers: int  # >= 1
    slots: int  # trainers each worker has room for, >= 1
    prefix: str
    upload_mib_per_s: float | None = None  # that the uploads of each worker may take together; None: no cap
    zygote_after_s: float = 0.0  # the age of a worker from which on it has a warm process


class LocalCluster:
    """Async context manager: inside it the cluster runs, and is kept running."""

    def __init__(self, folder: DataFolder, plan: LocalPlan, *, notice: Notice) -> None:
        self.folder = folder
        self._plan = plan
        self._notice = notice
        self._lock: FolderLock | None = None
        self._etcd: EmbeddedEtcd | None = None
        self._etcd_watch: asyncio.Task[None] | None = None
        self._supervisor: Supervisor | None = None

    @property
    def etcd(self) -> str:
        """host:port of the cluster's etcd."""
        assert self._etcd is not None
        return self._etcd.endpoint

    async def __aenter__(self) -> "LocalCluster":
        self._lock = lock_folder(self.folder)
        os.environ[MARK] = str(self.folder.root)
        try:
            if ended := end_leftovers(self.folder.root):
                self._notice(f"ended {ended} processes that an earlier run left behind")
            await self._start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def failed(self) -> None:
        """Wait until a service is beyond help; raises its error."""
        assert self._supervisor is not None
        await self._supervisor.failed()

    def pids(self) -> dict[str, int]:
        """Pids of etcd and the services, by name."""
        pids = dict(self._supervisor.pids()) if self._supervisor is not None else {}
        if self._etcd is not None and self._etcd.alive() and self._etcd.pid is not None:
            pids["etcd"] = self._etcd.pid
        return pids

    async def _start(self) -> None:
        assert self._lock is not None
        self._supervisor = Supervisor(self.folder.root, lock_fd=self._lock.fd, notice=self._notice)
        self._etcd = open_etcd(self.folder)
        self._etcd.start()
        services = [self._coordinator(), *(self._worker(number) for number in range(self._plan.workers))]
        await asyncio.gather(*(self._supervisor.start(service) for service in services))
        endpoint = self.etcd
        await self._etcd.wait_ready(ETCD_READY_S)
        if self.etcd != endpoint:  # another process took the port between its choice and etcd's bind
            raise RetryableError(f"port of {endpoint} was taken while etcd started: run it again")
        self._etcd_watch = self._supervisor.keep_running("etcd", self._keep_etcd)
        self.folder.publish(Endpoints(etcd=self.etcd, prefix=self._plan.prefix, pid=os.getpid()))

    async def _keep_etcd(self) -> None:
        young_deaths = 0
        clock = asyncio.get_running_loop().time
        while True:
            assert self._etcd is not None
            born = clock()
            await wait_for_exit(self._etcd)
            young_deaths = young_deaths + 1 if clock() - born < ETCD_READY_S else 0
            self._notice("etcd died; starting it again")
            await asyncio.sleep(backoff_s(young_deaths))
            self._etcd.start()
            try:
                await self._etcd.wait_ready(ETCD_READY_S)
            except UserError:
                if young_deaths > YOUNG_DEATHS_MAX:
                    raise  # it died again while it started, once too often

    async def stop(self) -> None:
        """Take everything down, gracefully; safe to call twice."""
        self.folder.withdraw()
        if self._supervisor is not None:
            await self._supervisor.stop(["coordinator"])
            await self._supervisor.stop([f"worker-{number}" for number in range(self._plan.workers)])
        await self._stop_etcd()
        self._sweep()

    def kill(self) -> None:
        """Take everything down at once: the second Ctrl-C."""
        self.folder.withdraw()
        if self._supervisor is not None:
            self._supervisor.kill()
        end_leftovers(self.folder.root)

    async def _stop_etcd(self) -> None:
        if self._etcd_watch is not None:
            self._etcd_watch.cancel()
            await asyncio.gather(self._etcd_watch, return_exceptions=True)
        if self._etcd is not None:
            await asyncio.to_thread(self._etcd.stop)

    def _sweep(self) -> None:
        end_leftovers(self.folder.root)
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _coordinator(self) -> Service:
        return Service(
            name="coordinator",
            argv=(*_dtrain("coordinator"), *self._common(), "--listen", "127.0.0.1:0"),
            log=self.folder.service_log("coordinator"),
            stop_grace_s=COORDINATOR_GRACE_S,
        )

    def _worker(self, number: int) -> Service:
        name = f"worker-{number}"
        cap = self._plan.upload_mib_per_s
        return Service(
            name=name,
            argv=(
                *_dtrain("worker"),
                *self._common(),
                *("--listen", "127.0.0.1:0", "--worker-id", name, "--slots", str(self._plan.slots)),
                *("--data-dir", str(self.folder.worker(number)), "--orphan-after", str(ORPHAN_AFTER_S)),
                *("--zygote-after", str(self._plan.zygote_after_s)),
                *(() if cap is None else ("--upload-mib-per-s", str(cap))),
            ),
            log=self.folder.service_log(name),
            stop_grace_s=WORKER_GRACE_S,
        )

    def _common(self) -> tuple[str, ...]:
        return ("--etcd", self.etcd, "--prefix", self._plan.prefix, "--etcd-wait", str(ETCD_READY_S))


def _dtrain(verb: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "dtrain", verb)


def open_etcd(folder: DataFolder) -> EmbeddedEtcd:
    """The etcd of a data folder, not started yet."""
    return EmbeddedEtcd(folder.etcd, log_path=folder.service_log("etcd"))


async def wait_for_exit(etcd: EmbeddedEtcd) -> None:
    """Wait until etcd's process ends: at once where the kernel offers pidfds, else within a short poll."""
    loop = asyncio.get_running_loop()
    try:
        fd = os.pidfd_open(etcd.pid or 0)
    except (AttributeError, OSError):
        while etcd.alive():
            await asyncio.sleep(ETCD_POLL_S)
        return
    gone = asyncio.Event()
    loop.add_reader(fd, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)


async def with_etcd_of(folder: DataFolder, use: Callable[[str], Awaitable[Result]]) -> Result:
    """Run the etcd of a folder where nothing else runs while ``use`` is called with its endpoint."""
    lock = lock_folder(folder)
    os.environ[MARK] = str(folder.root)
    etcd = open_etcd(folder)
    try:
        etcd.start()
        await etcd.wait_ready(ETCD_READY_S)
        return await use(etcd.endpoint)
    finally:
        await asyncio.to_thread(etcd.stop)
        lock.release()
