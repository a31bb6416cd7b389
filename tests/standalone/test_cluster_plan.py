"""What a run on this machine tells the workers that it starts."""

from pathlib import Path

import pytest

from dtrain.cli.services import worker_command
from dtrain.standalone.cluster import LocalCluster, LocalPlan, open_etcd
from dtrain.standalone.data_folder import DataFolder


@pytest.mark.parametrize("cap", [None, 8.5])
def test_workers_take_the_cap_of_the_run_and_their_place_in_its_folder(tmp_path: Path, cap: float | None) -> None:
    plan = LocalPlan(workers=2, slots=3, prefix="/here", upload_mib_per_s=cap, zygote_after_s=2.0)
    cluster = LocalCluster(DataFolder.at(tmp_path), plan, notice=lambda text: None)
    cluster._etcd = open_etcd(cluster.folder)
    verb, *arguments = cluster._worker(1).argv[cluster._worker(1).argv.index("worker") :]
    with worker_command.make_context(verb, arguments) as context:
        told = context.params
    assert (told["upload_mib_per_s"], told["zygote_after_s"]) == (cap, 2.0)
    assert (told["worker_id"], told["slots"], told["prefix"]) == ("worker-1", 3, "/here")
    assert told["data_dir"] == str(cluster.folder.worker(1))
