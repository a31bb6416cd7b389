"""Real S3 servers for tests, on loopback: SeaweedFS as a process, moto in this process.

SeaweedFS checks signatures and honours conditional puts as S3 does, and can be killed and started again; moto accepts
any credentials and keeps everything in memory. Both end with their context, and keep nothing outside the folder they
were given.
"""

import json
import os
import subprocess
import sysconfig
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import boto3.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from tests.support.ports import free_ports, remove_sockets
from tests.support.processes import SESSION_MARK

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

START_DEADLINE_S = 60.0  # it takes under a second on an idle machine
PORT_TRIES = 3  # a free port may be taken between its finding and its use
POLL_S = 0.05


@dataclass(slots=True, kw_only=True)
class S3Server:
    """A running server with one empty bucket."""

    endpoint: str
    bucket: str
    access_key: str
    secret_key: str
    pid: int  # of the server's process; 0 if it runs in this one

    def uri(self, prefix: str = "") -> str:
        """Return the URI for :func:`dtrain.storage.uris.open_store`."""
        return f"s3://{self.bucket}/{prefix}".rstrip("/") + f"?endpoint={self.endpoint}&region=us-east-1"

    @property
    def environment(self) -> dict[str, str]:
        """The variables that a process needs to use it, and none that would lead it elsewhere."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def client(self) -> "S3Client":
        """Return a plain boto3 client, for looking behind the store's back."""
        session = boto3.session.Session(
            aws_access_key_id=self.access_key, aws_secret_access_key=self.secret_key, region_name="us-east-1"
        )
        config = Config(
            connect_timeout=2,
            read_timeout=10,
            retries={"total_max_attempts": 1},
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
        )
        return session.client("s3", endpoint_url=self.endpoint, config=config)


@dataclass(slots=True, kw_only=True)
class Seaweed(S3Server):
    """SeaweedFS as a process. Data and ports survive a kill."""

    folder: Path
    ports: list[int]
    env: Mapping[str, str]
    volumes: int = 16  # of a GiB each; the room of what was deleted or written over comes back late
    process: "subprocess.Popen[bytes] | None" = field(default=None)

    def start(self) -> None:
        with (self.folder / "weed.log").open("ab") as log:
            self.process = subprocess.Popen(
                _command(self.folder, self.ports, self.volumes),
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self.process.pid

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """kill -9, and wait for its end. What it answered to is in the page cache, which outlives it."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        remove_sockets(self.ports)


def open_uploads(server: S3Server, prefix: str = "") -> list[str]:
    """The keys of the uploads in parts that were neither completed nor aborted."""
    listed = server.client().list_multipart_uploads(Bucket=server.bucket, Prefix=prefix)
    return [upload["Key"] for upload in listed.get("Uploads", [])]


@contextmanager
def seaweedfs(
    folder: Path, *, bucket: str = "dtrain-test", env: Mapping[str, str] | None = None, volumes: int = 16
) -> Iterator[Seaweed]:
    """Run SeaweedFS with its data in ``folder`` and ``env`` in its environment; kill it on leaving."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "s3.json").write_text(json.dumps(_IDENTITIES))
    marks = {SESSION_MARK: os.environ[SESSION_MARK]} if SESSION_MARK in os.environ else {}
    own = {"PATH": os.environ.get("PATH", ""), "HOME": str(folder), "TMPDIR": str(folder), **marks, **(env or {})}
    for tries_left in reversed(range(PORT_TRIES)):
        ports = free_ports(9)
        server = Seaweed(
            endpoint=f"http://127.0.0.1:{ports[0]}",
            bucket=bucket,
            access_key="dtraintestkey",
            secret_key="dtraintestsecret",
            pid=0,
            folder=folder,
            ports=ports,
            env=own,
            volumes=volumes,
        )
        server.start()
        try:
            if not _wait_until_ready(server):
                if tries_left:
                    continue
                raise RuntimeError(f"SeaweedFS ended at once:\n{_log_tail(folder)}")
            yield server
            return
        finally:
            server.kill()


@contextmanager
def moto(*, bucket: str = "dtrain-test") -> Iterator[S3Server]:
    """Run moto's server in a thread; stop it on leaving."""
    from moto.server import ThreadedMotoServer

    with ExitStack() as stack:
        threaded = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        threaded.start()
        stack.callback(threaded.stop)
        host, port = threaded.get_host_and_port()
        server = S3Server(endpoint=f"http://{host}:{port}", bucket=bucket, access_key="any", secret_key="thing", pid=0)
        server.client().create_bucket(Bucket=bucket)
        yield server


_IDENTITIES = {
    "identities": [
        {
            "name": "tests",
            "credentials": [{"accessKey": "dtraintestkey", "secretKey": "dtraintestsecret"}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
    ]
}


def _command(folder: Path, ports: list[int], volumes: int) -> list[str]:
    return [
        str(Path(sysconfig.get_path("scripts")) / "weed"),
        "server",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-s3.port={ports[0]}",
        f"-s3.port.grpc={ports[1]}",
        f"-master.port={ports[2]}",
        f"-master.port.grpc={ports[3]}",
        f"-volume.port={ports[4]}",
        f"-volume.port.grpc={ports[5]}",
        f"-filer.port={ports[6]}",
        f"-filer.port.grpc={ports[7]}",
        "-s3",
        "-filer",
        f"-s3.config={folder / 's3.json'}",
        "-s3.autoCreateBucket=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.peers=none",  # alone: no waiting for an election
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=1024",
        f"-volume.max={volumes}",
        "-volume.preStopSeconds=0",
        "-webdav=false",
    ]


def _wait_until_ready(server: Seaweed) -> bool:
    """Make the bucket as soon as the server takes it; return False if the process ended before."""
    client, process = server.client(), server.process
    assert process is not None
    deadline = time.monotonic() + START_DEADLINE_S
    last: Exception | None = None
    while time.monotonic() < deadline:
        try:
            client.create_bucket(Bucket=server.bucket)
            client.put_object(Bucket=server.bucket, Key="ready", Body=b"x")  # volumes come later than the gateway
            client.delete_object(Bucket=server.bucket, Key="ready")
            return True
        except ClientError as error:
            last = error
        except BotoCoreError as error:
            last = error
        try:
            process.wait(timeout=POLL_S)  # the pause between two tries ends early if the server does
            return False
        except subprocess.TimeoutExpired:
            continue
    raise TimeoutError(f"SeaweedFS was not ready after {START_DEADLINE_S} s: {last}")


def _log_tail(folder: Path) -> str:
    return (folder / "weed.log").read_text(errors="replace")[-2000:]
