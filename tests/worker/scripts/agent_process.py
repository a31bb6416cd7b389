"""One agent as a process of its own, so that a test can kill it: its settings are the first argument, as JSON."""

import asyncio
import json
import logging
import sys
from pathlib import Path

from dtrain.common.errors import UserError
from dtrain.common.names import WorkerId
from dtrain.worker.agent import serve
from dtrain.worker.config import WorkerConfig

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    given = json.loads(sys.argv[1])
    config = WorkerConfig(
        etcd=tuple(given["etcd"]),
        worker_id=WorkerId(given.get("worker_id", "w1")),
        data_dir=Path(given["data_dir"]),
        shared_memory=Path(given["shared_memory"]),
        slots=given.get("slots", 2),
        heartbeat_s=given.get("heartbeat_s", 0.1),
        lease_ttl_s=given.get("lease_ttl_s", 2.0),
        fence_after_s=given.get("fence_after_s", 1800.0),
        orphan_after_s=given.get("orphan_after_s", 60.0),
        zygote=False,  # what these tests run imports no torch
    )
    try:
        sys.exit(asyncio.run(serve(config)))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
