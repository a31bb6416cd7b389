"""A script written for torchrun, which knows nothing of dtrain, finds what it would find there, and is restarted."""

import json
import subprocess
import sys
from pathlib import Path

from tests.cli.commands import assert_nothing_is_left, dtrain, environment

SCRIPT = """
import json, os, signal, sys
import torch, torch.distributed as dist

dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
names = [n for n in os.environ if n.startswith(("TORCHELASTIC_", "MASTER_", "ROLE_", "GROUP_")) or n.endswith("RANK")]
names += ["WORLD_SIZE", "LOCAL_WORLD_SIZE"]
with open(f"{sys.argv[1]}-{os.environ['TORCHELASTIC_RESTART_COUNT']}-{dist.get_rank()}.json", "w") as file:
    json.dump({"sum": total.item(), "argv": sys.argv, **{name: os.environ[name] for name in names}}, file)
dist.barrier()
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and dist.get_rank() == 1:
    os.kill(os.getpid(), signal.SIGKILL)
dist.barrier()
dist.destroy_process_group()
"""


def seen(folder: Path, name: str, restart: int, rank: int) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / f"{name}-{restart}-{rank}.json").read_text())
    return found


def test_a_torchrun_script_runs_unchanged_and_is_restarted(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=3"]
    alone = environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    subprocess.run(
        [sys.executable, *torchrun, "script.py", "theirs"],
        cwd=tmp_path,
        env=alone,
        check=True,
        timeout=180,
        capture_output=True,
    )
    answer = dtrain("run", "--nproc_per_node=2", "--max_restarts=3", "script.py", "ours", cwd=tmp_path, deadline_s=180)
    assert answer.code == 0, answer.stderr
    assert "generation 1 failed: rank 1" in answer.stderr
    for restart in (0, 1):
        for rank in (0, 1):
            theirs, ours = seen(tmp_path, "theirs", restart, rank), seen(tmp_path, "ours", restart, rank)
            assert theirs.keys() - ours.keys() == set(), "a variable that torchrun sets is missing"
            same = ("sum", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
            same += ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS")
            assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
            assert ours["argv"] == ["script.py", "ours"] or Path(ours["argv"][0]).name == "script.py"
    assert_nothing_is_left(tmp_path)
