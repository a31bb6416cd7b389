"""dtrain's side of the restores: trainers that already wait, and the worker's own parts that bring their state."""

import asyncio
import time
from pathlib import Path

from benchmarks.checkpoint.ours import JOB, PAUSE_S, Checkpoints, Node, Sizes
from dtrain.storage.keys import manifest_key
from dtrain.worker.core.actions import FetchRestore
from dtrain.worker.core.inputs import RestoreReady
from dtrain.worker.core.states import RestoreSource


def measure_restores(folder: Path, sizes: Sizes, *, from_memory: bool, ranks: int = 1) -> list[float]:
    """Seconds from the worker's command to the first step, of trainers that already wait for their state."""
    node = Node(folder, (folder / "store").as_uri(), ranks=ranks, threads=2 // ranks)
    found: list[float] = []

    async def prepare() -> None:
        await node.until(node.trains, "the first steps")
        await node.checkpoint(1, Checkpoints(), lambda *_: 0.0)

    async def restore(source: RestoreSource) -> None:
        ready = [folder / f"ready{rank}" for rank in range(ranks)]
        await node.until(lambda: all(file.exists() for file in ready), "the trainers to be ready")
        await asyncio.sleep(PAUSE_S)
        node.restored.clear()
        began = time.monotonic()
        node.restores.start(FetchRestore(job=JOB, generation=node.generation, spec=node.spec))
        await node.until(lambda: bool(node.restored), "the restore")
        if not isinstance(node.restored[0], RestoreReady):
            raise SystemExit(f"the restore failed: {node.restored[0]}")
        for of in node.rank_ids():
            node.mailboxes.open_restore(of)
        done = [folder / f"restored{rank}" for rank in range(ranks)]
        await node.until(lambda: all(file.exists() and file.read_text() for file in done), "the first steps")
        found.append(max(float(file.read_text()) for file in done) - began)

    async def whole() -> None:
        async with asyncio.TaskGroup() as group:
            node.tasks.group = group
            await node.run(prepare(), node.start(mib=sizes.mib, tensors=sizes.tensors, copies=0))
            assert node.manifest is not None
            manifest, digest = node.manifest
            source = RestoreSource(
                checkpoint=manifest.checkpoint,
                attempt=manifest.attempt,
                step=manifest.step,
                manifest_key=manifest_key(JOB, manifest.checkpoint, manifest.attempt),
                manifest_digest=digest,
                store=node.store_uri,
            )
            if not from_memory:
                node.arenas.remove(JOB)
            for _ in range(sizes.rounds):
                for file in (*folder.glob("ready*"), *folder.glob("restored*")):
                    file.unlink()
                trainers = node.start(restore=source, mib=sizes.mib, tensors=sizes.tensors, copies=0)
                await node.run(restore(source), trainers)
                node.mailboxes.forget(JOB, node.generation)
                node.dirs.remove(JOB, node.generation)

    try:
        asyncio.run(whole())
    finally:
        node.close()
    return found
