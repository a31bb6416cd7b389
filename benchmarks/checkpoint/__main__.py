"""What a checkpoint costs, beside torch's own ways and beside bare copies, all in one run on one disk.

    python -m benchmarks.checkpoint [--mib 1024] [--rounds 5] [--ranks 1 2] [--folder .] [--plot FILE] [--only PART]

Each rank has its own state of 200 float32 tensors. Memory needed: about 7 GiB a rank at 1024 MiB.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from benchmarks.checkpoint import plot
from benchmarks.checkpoint.bare import client, mapped, multipart_put, whole_put
from benchmarks.checkpoint.figures import Row, as_markdown, gib_s, ms, warm
from benchmarks.checkpoint.our_restores import measure_restores
from benchmarks.checkpoint.ours import Checkpoints, Said, Sizes, measure_checkpoints
from benchmarks.checkpoint.rivals import LOADS, MAPPED_COPY

TENSORS = 200
SEAWEED_VOLUMES = 64  # of a GiB: all rounds find room
CORES = 2  # threads of all ranks together in the settings that fill the machine
Result = TypeVar("Result")
Rounds = dict[str, list[tuple[float, float]]]  # way -> stall and time until safe, one a round

PARTS = ("local", "s3", "restore")


def in_folder(where: Path, work: Callable[[Path], Result]) -> Result:
    folder = Path(tempfile.mkdtemp(prefix="dtrain-bench-", dir=where))
    os.environ["BENCH_FOLDER"] = str(folder)
    try:
        return work(folder)
    finally:
        shutil.rmtree(folder)


def rivals(what: str, folder: Path, sizes: Sizes, *, ranks: int, threads: int) -> list[Any]:
    """Run ``what`` of rivals.py on ``ranks`` processes; return what each said."""
    script = Path(__file__).with_name("rivals.py")
    arguments = [str(folder), *map(str, (sizes.mib, sizes.tensors, threads, sizes.rounds))]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), what, str(rank), str(ranks), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(ranks)
    ]
    try:
        return [json.loads(process.communicate(timeout=1800)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def loads(folder: Path, sizes: Sizes) -> dict[str, list[float]]:
    """Seconds of each way to load, by turns, each in a process that has just begun, as dtrain's restores are."""
    found: dict[str, list[float]] = {way: [] for way in LOADS}
    staged = Path("/dev/shm") / f"dtrain-bench-{folder.name}"
    try:
        rivals("prepare", folder, sizes, ranks=1, threads=CORES)
        with staged.open("wb") as file:
            for _ in range(sizes.mib):
                file.write(os.urandom(1 << 20))
        for _ in range(sizes.rounds):
            for way, times in found.items():
                (folder / "rendezvous").unlink(missing_ok=True)
                times += rivals(way, folder, sizes, ranks=1, threads=CORES)
    finally:
        staged.unlink(missing_ok=True)
    return found


def slowest(said: list[Said]) -> Rounds:
    """Of each round the slowest rank, for stall and safety apart."""
    found: Rounds = {}
    for way in said[0]:
        by_round = zip(*(rank[way] for rank in said), strict=True)
        found[way] = [(max(stall for stall, _ in of_ranks), max(safe for _, safe in of_ranks)) for of_ranks in by_round]
    return found


def local(where: Path, sizes: Sizes, *, ranks: int, threads: int) -> tuple[list[Row], plot.Spread, plot.Spread]:
    """Staging and a local folder."""
    setting = f"{ranks} × {threads}"
    own = in_folder(where, lambda folder: measure_checkpoints(folder, sizes, ranks=ranks, threads=threads))
    files = in_folder(
        where, lambda folder: measure_checkpoints(folder, sizes, ranks=ranks, threads=threads, in_files=True)
    )
    theirs = slowest(in_folder(where, lambda folder: rivals("save", folder, sizes, ranks=ranks, threads=threads)))
    stalls = {"dtrain": own.stalls_s, "dtrain, slots in files": files.stalls_s}
    durable = {"dtrain": own.durable_s, "dtrain, slots in files": files.durable_s}
    for way, times in theirs.items():
        stalls[way], durable[way] = [stall for stall, _ in times], [safe for _, safe in times]
    rows = _local_rows(own, stalls, durable, setting)
    print(f"\n{setting}: seconds, median without the first round (all rounds)")
    for way in stalls:
        rounds = " ".join(f"{stall:.3f}/{safe:.2f}" for stall, safe in zip(stalls[way], durable[way], strict=True))
        print(f"  {way:38} stall {warm(stalls[way]):.3f}, safe {warm(durable[way]):.2f}   ({rounds})")
    print(f"  one memcpy {warm(own.memcpy_s):.3f}; slots in files: first {files.stalls_s[0]:.3f}", flush=True)
    return rows, {w: s[1:] for w, s in stalls.items()}, {w: s[1:] for w, s in durable.items()}


def _local_rows(own: Checkpoints, stalls: plot.Spread, durable: plot.Spread, setting: str) -> list[Row]:
    stall, safe, memcpy = warm(own.stalls_s), warm(own.durable_s), warm(own.memcpy_s)
    plain = warm(stalls["torch.save"])
    asynchronous = min(warm(rounds) for way, rounds in stalls.items() if "async" in way)
    quickest = min((warm(rounds), way) for way, rounds in durable.items() if not way.startswith("dtrain"))
    bare = median(own.bare_s[1:])
    size = own.state_bytes

    def row(what: str, ours: str, against: str, ratio: float, bound: float, *, most: bool = True) -> Row:
        return Row(what=what, setting=setting, ours=ours, against=against, ratio=ratio, bound=bound, most=most)

    return [
        row("warm stall", ms(stall), f"one memcpy {ms(memcpy)}", stall / memcpy, 1.25),
        row("warm stall", ms(stall), f"best dcp.async_save {ms(asynchronous)}", stall / asynchronous, 0.65),
        row("warm stall", ms(stall), f"torch.save {ms(plain)}", stall / plain, 0.12),
        row("first stall", ms(own.stalls_s[0]), f"warm {ms(stall)}", own.stalls_s[0] / stall, 2.0),
        row(
            "step while uploading",
            f"{own.step_ratio:.2f} of one without",
            f"while sendfile + fsync: {own.bare_step_ratio:.2f}",
            own.step_ratio,
            1.10,
        ),
        row("command to safe, folder", ms(safe), f"sendfile + fsync {ms(bare)}", bare / safe, 0.8, most=False),
        row("command to safe, folder", ms(safe), f"{quickest[1]} {ms(quickest[0])}", safe / quickest[0], 1.0),
        row(
            "trainer's memory above its state",
            f"{own.above_state_bytes / (1 << 20):.0f} MiB",
            f"state {size / (1 << 20):.0f} MiB",
            own.above_state_bytes / size,
            0.05,
        ),
    ]


@contextmanager
def sink() -> Iterator[str]:
    """Run the server that keeps nothing; give its endpoint."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.checkpoint.sink"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.wait()


def s3(where: Path, sizes: Sizes) -> list[Row]:
    """Against a server that keeps nothing and a real one; one rank with one thread."""
    from tests.support.s3_server import seaweedfs

    rows = []
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="dtrain-bench-", dir=where))
        stack.callback(shutil.rmtree, folder)
        os.environ.update(AWS_ACCESS_KEY_ID="any", AWS_SECRET_ACCESS_KEY="thing")
        for name in ("a sink", "SeaweedFS"):
            if name == "a sink":
                endpoint, bucket = stack.enter_context(sink()), "bench"
            else:
                server = stack.enter_context(seaweedfs(folder / "seaweed", volumes=SEAWEED_VOLUMES))
                os.environ.update(server.environment)
                endpoint, bucket = server.endpoint, server.bucket
            rows += _s3_rows(where, sizes, name, endpoint, bucket)
    return rows


def _s3_rows(where: Path, sizes: Sizes, name: str, endpoint: str, bucket: str) -> list[Row]:
    plain = client(endpoint)
    found: list[Row] = []
    best: tuple[float, str] = (float("inf"), "")
    own: Checkpoints | None = None
    for way, put in (("one put", whole_put), ("multipart", multipart_put)):
        bare = mapped(put, plain, bucket)
        store = f"s3://{bucket}/bench-{put.__name__.replace('_', '-')}?endpoint={endpoint}&region=us-east-1"
        measure = partial(measure_checkpoints, sizes=sizes, store=store, bare=bare)
        measured = in_folder(where, measure)
        best = min(best, (median(measured.bare_s[1:]), way))
        if own is None or warm(measured.durable_s) < warm(own.durable_s):
            own = measured
    assert own is not None
    safe = warm(own.durable_s)
    print(f"S3, {name}: stored after staging {warm(own.stored_s):.3f}, bare {best}, all {own.durable_s}", flush=True)
    found.append(
        Row(
            what=f"command to safe, S3: {name}",
            setting="1 × 1",
            ours=f"{ms(safe)}, {gib_s(own.state_bytes, safe)}",
            against=f"bare boto3, {best[1]} {ms(best[0])}",
            ratio=best[0] / safe,
            bound=0.85,
            most=False,
        )
    )
    return found


def restore(where: Path, sizes: Sizes) -> list[Row]:
    """One rank with two threads: what restores has the machine for itself."""
    own = in_folder(where, lambda folder: measure_restores(folder, sizes, from_memory=False))
    memory = in_folder(where, lambda folder: measure_restores(folder, sizes, from_memory=True))
    said = in_folder(where, lambda folder: loads(folder, sizes))
    theirs = {way: median(times) for way, times in said.items()}
    floor = theirs.pop(MAPPED_COPY)
    best = min((took, way) for way, took in theirs.items())
    for way, times in {"dtrain, folder": own, "dtrain, from memory": memory, **said}.items():
        print(f"  {way:38} restored {median(times):.3f}   ({' '.join(f'{took:.3f}' for took in times)})", flush=True)
    return [
        Row(
            what="restore, folder",
            setting=f"1 × {CORES}",
            ours=ms(median(own)),
            against=f"{best[1]} {ms(best[0])}",
            ratio=best[0] / median(own),
            bound=1.0,
            most=False,
        ),
        Row(
            what="restore, from memory",
            setting=f"1 × {CORES}",
            ours=ms(median(memory)),
            against=f"mapped memory + copy {ms(floor)}",
            ratio=floor / median(memory),
            bound=0.9,
            most=False,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024, help="state of a rank")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk that is measured")
    parser.add_argument("--plot", type=Path, help="where the picture goes (SVG)")
    parser.add_argument("--only", choices=PARTS, help="one part of the table")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # servers and folders go with the stack
    if given.plot:
        plot.prepare()
    where = given.folder.resolve()
    sizes = Sizes(mib=given.mib, tensors=TENSORS, rounds=given.rounds)
    rows: list[Row] = []
    for part in PARTS:
        if given.only not in (None, part):
            continue
        if part == "local":
            for ranks in given.ranks:
                for threads in sorted({1, CORES // ranks}):
                    found, stalls, durable = local(where, sizes, ranks=ranks, threads=threads)
                    rows += found
                    if given.plot and (ranks, threads) == (1, 1):
                        plot.draw(given.plot, stalls, durable, title=f"One checkpoint of {given.mib} MiB, one rank")
        else:
            rows += s3(where, sizes) if part == "s3" else restore(where, sizes)
    print(f"\n{given.mib} MiB a rank, {TENSORS} tensors, medians of {given.rounds}, load {os.getloadavg()[0]:.1f}\n")
    print(as_markdown(rows))


if __name__ == "__main__":
    main()
