"""The main job, with a death on the way: two ranks learn handwritten digits, one of them is killed with -9.

    make demo        (or: .venv/bin/python examples/demo.py)

Everything runs on this machine and in one folder, .dtrain-demo: an etcd that the package brings, a coordinator, a
worker, two ranks, and the checkpoints. What is killed comes back by itself. At the end stands what happened, read
from the event log, and the commands to look further; they can be pasted.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from dtrain.cli.services import etcdctl

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "examples" / "digits.py"
JOB = "digits"
STEPS, SLOW_MS, EVERY_STEPS = 300, 20, 60
VICTIM = 1  # rank
CHECKPOINTS_WANTED = 3
DEADLINE_S = 300.0
POLL_S = 0.1


class Demo:
    """The commands of the demo, all on one data folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._dtrain = [str(Path(sys.executable).parent / "dtrain")]

    def command(self, verb: str, *arguments: str) -> list[str]:
        return [*self._dtrain, verb, "--data-dir", str(self._folder), *arguments]

    def ask(self, verb: str, *arguments: str) -> str:
        """Run a verb to its end and return what it printed."""
        return subprocess.run(
            self.command(verb, *arguments), stdout=subprocess.PIPE, text=True, check=True, timeout=DEADLINE_S
        ).stdout

    def run(self) -> None:
        options = ["--name", JOB, "--nproc-per-node", "2", "--every-steps", str(EVERY_STEPS)]
        script = [str(DIGITS), "--steps", str(STEPS), "--slow-ms", str(SLOW_MS)]
        say("This is what runs:", shlex.join(["dtrain", "run", *options, *script]))
        run = subprocess.Popen(
            self.command("run", *options, *script), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        try:
            self._kill_one_rank(run)
            code = run.wait(DEADLINE_S)
        except BaseException:
            # Ctrl-C reached the run as well. Otherwise it is asked to leave; it takes everything down with it.
            run.send_signal(signal.SIGTERM)
            run.wait()
            raise
        if code != 0:
            raise SystemExit(f"demo: the run ended with code {code}")

    def _kill_one_rank(self, run: subprocess.Popen[bytes]) -> None:
        """Wait in the event log for the first committed checkpoint, then kill -9 one rank."""
        while not (self._folder / "endpoints.json").exists():
            if run.poll() is not None:
                raise SystemExit(f"demo: the run ended with code {run.returncode} before it began")
            time.sleep(POLL_S)
        self._wait_for("CheckpointCommitted")
        ranks = json.loads(self.ask("status", JOB, "-o", "json"))["ranks"]
        [(pid, step)] = [(rank["pid"], rank["completed_step"]) for rank in ranks if rank["rank"] == VICTIM]
        say(f"A checkpoint is committed. Now: kill -9 {pid}  (rank {VICTIM}, at step {step})")
        os.kill(pid, signal.SIGKILL)

    def _wait_for(self, event_type: str) -> None:
        """Follow the job's history until an event of this type."""
        follow = subprocess.Popen(
            self.command("history", JOB, "--follow", "-o", "json"), stdout=subprocess.PIPE, text=True
        )
        try:
            assert follow.stdout is not None
            for line in follow.stdout:
                if json.loads(line)["type"] == event_type:
                    return
            raise SystemExit(f"demo: the history ended before {event_type}")
        finally:
            follow.kill()
            follow.wait()

    def tell(self) -> None:
        """Say what happened, from the log."""
        events = [json.loads(line) for line in self.ask("history", JOB, "-o", "json").splitlines()]
        committed = sum(event["type"] == "CheckpointCommitted" for event in events)
        generations = sum(event["type"] == "GenerationStarted" for event in events)
        if committed < CHECKPOINTS_WANTED or generations < 2 or events[-1]["type"] != "JobSucceeded":
            raise SystemExit(f"demo: not as expected: {committed} checkpoints, {generations} generations, {events[-1]}")
        say("What happened, as the event log tells it:")
        print(self.ask("history", JOB))
        say(f"{committed} checkpoints committed, {generations} generations, one kill -9, and the job succeeded.")
        say("Look further (these can be pasted):")
        prefix = f"/dtrain/jobs/{JOB}/events/"
        port = json.loads((self._folder / "etcd" / "ports.json").read_text())["client"]
        paste(self.command("checkpoints", JOB))
        paste(self.command("history", JOB, "-o", "json"))
        paste(self.command("etcd", "get", "--prefix", prefix))
        paste(self.command("etcd"), " &   # serves the log, so that the next line works; end it with: kill %1")
        paste(etcdctl(f"127.0.0.1:{port}", ["get", "--prefix", prefix]))
        paste(["ls", "-R", str(self._folder / "store")])


def paste(words: list[str], behind: str = "") -> None:
    """Print a command that can be pasted; paths below the working directory are said relative to it."""
    here = f"{Path.cwd()}/"
    print("  " + shlex.join(word.removeprefix(here) for word in words) + behind)


def say(*lines: str) -> None:
    print("\ndemo: " + "\n      ".join(lines) + "\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=ROOT / ".dtrain-demo", help="made anew; default: %(default)s")
    folder = parser.parse_args().data_dir.absolute()
    for name in [name for name in os.environ if name.startswith("DTRAIN_")]:
        del os.environ[name]  # set for a cluster of the caller's: the demo brings its own
    shutil.rmtree(folder, ignore_errors=True)
    demo = Demo(folder)
    demo.run()
    demo.tell()


if __name__ == "__main__":
    main()
