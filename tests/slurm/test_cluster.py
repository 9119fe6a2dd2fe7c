"""The test cluster itself: what it says of its nodes, what it runs, and what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slurm import cluster as cluster_module
from slurm.cluster import GPUS, NODES, Cluster
from waiting import until

_DAEMONS = {"munged", "slurmctld", "slurmscriptd", "slurmd", "unshare", "sh", "sleep"}
_SHOW = "echo $(hostname) $SLURM_PROCID $SLURM_GPUS_ON_NODE $CUDA_VISIBLE_DEVICES"


def _submit(cluster: Cluster, folder: Path, script: str, *options: str) -> str:
    (folder / "job.sh").write_text(f"#!/bin/bash\n{script}\n")
    options = (f"--chdir={folder}", f"--output={folder}/%A.out", "--open-mode=append", *options)
    return cluster.run("sbatch", "--parsable", *options, str(folder / "job.sh")).strip()


def _processes(folder: Path) -> set[str]:
    """The names of a cluster's processes. (Other clusters may come and go.)"""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(str(folder).encode() in (process / file).read_bytes() for file in ("environ", "cmdline")):
                found.add((process / "comm").read_text().strip())
    return found


def test_has_four_nodes_of_eight_gpus(cluster: Cluster) -> None:
    for partition in ("main", "gpu"):
        shown = cluster.run("sinfo", "-h", "-N", "-p", partition, "-o", "%N %T %c %m %G %f").splitlines()
        assert shown == [f"{node} idle 128 1000000 gpu:b200:8 b200" for node in NODES]
    assert cluster.run("sinfo", "-h", "-o", "%P %l").split() == ["main*", "7-00:00:00", "gpu", "7-00:00:00"]


@pytest.mark.parametrize(
    ("option", "gpus"), [("--gpus-per-node=2", "0,1"), ("--gres=gpu:b200:8", "0,1,2,3,4,5,6,7"), ("--gpus=0", "")]
)
def test_job_sees_its_nodes_and_gpus(cluster: Cluster, tmp_path: Path, option: str, gpus: str) -> None:
    job = _submit(cluster, tmp_path, f"srun bash -c '{_SHOW}'", "--nodes=2", "--ntasks-per-node=1", option)
    ended = cluster.wait(job, {"COMPLETED", "FAILED"}, 60)
    assert (ended["JobState"], ended["ExitCode"], ended["NodeList"]) == ("COMPLETED", "0:0", "n[1-2]")
    lines = sorted(line.split() for line in (tmp_path / f"{job}.out").read_text().splitlines())
    shown = [str(len(gpus.split(","))), gpus] if gpus else []
    assert lines == [["n1", "0", *shown], ["n2", "1", *shown]]


def test_all_gpus_of_all_nodes_in_one_job(cluster: Cluster, tmp_path: Path) -> None:
    options = ("--nodes=4", "--ntasks-per-node=1", f"--gres=gpu:{GPUS}")
    job = _submit(cluster, tmp_path, f"srun bash -c '{_SHOW}'", *options)
    assert cluster.wait(job, {"COMPLETED", "FAILED"}, 60)["NodeList"] == "n[1-4]"
    lines = sorted((tmp_path / f"{job}.out").read_text().split("\n"))
    assert lines == ["", *(f"{node} {rank} 8 0,1,2,3,4,5,6,7" for rank, node in enumerate(NODES))]
    with pytest.raises(AssertionError, match="Requested node configuration is not available"):
        _submit(cluster, tmp_path, "true", f"--gres=gpu:{GPUS + 1}")


def test_array_elements(cluster: Cluster, tmp_path: Path) -> None:
    job = _submit(cluster, tmp_path, "exit $SLURM_ARRAY_TASK_ID", "--array=0,3")
    assert cluster.wait(f"{job}_0", {"COMPLETED", "FAILED"}, 60)["ExitCode"] == "0:0"
    assert cluster.wait(f"{job}_3", {"COMPLETED", "FAILED"}, 60)["ExitCode"] == "3:0"
    with pytest.raises(AssertionError, match=f"{job} is not one job"):
        cluster.job(job)


def test_wait_shows_what_it_waited_for(cluster: Cluster, tmp_path: Path) -> None:
    job = _submit(cluster, tmp_path, "echo this is $((6 * 7)); exit 5")
    with pytest.raises(AssertionError, match=r"not within 1 s(?s:.*)ExitCode=5:0(?s:.*)this is 42(?s:.*)slurmctld.log"):
        cluster.wait(job, "COMPLETED", 1)


def test_node_has_its_own_name_hosts_and_shared_memory(cluster: Cluster) -> None:
    mine = {name: Path(name).read_text() for name in ("/etc/hosts", "/etc/hostname")}
    cluster.execute("n1", "touch", "/dev/shm/of-n1")
    assert cluster.execute("n1", "hostname") == "n1\n"
    assert [cluster.execute(node, "ls", "/dev/shm") for node in ("n1", "n2")] == ["of-n1\n", ""]
    addresses = {cluster.execute("n1", "getent", "hosts", node).split()[0] for node in NODES}
    assert len(addresses) == len(NODES)
    assert {name: Path(name).read_text() for name in mine} == mine
    # The environment of a job need not say where slurm.conf is.
    assert "n4" in cluster.execute("n1", "env", "-u", "SLURM_CONF", "sinfo", "-h", "-N")


def test_pids_are_those_of_one_node(cluster: Cluster, tmp_path: Path) -> None:
    job = _submit(cluster, tmp_path, "srun sleep 54321", "--nodes=2")
    cluster.wait(job, "RUNNING", 30)
    until(lambda: len(cluster.pids("n2", "sleep 54321$")) == 1, 30, lambda: "no task on n2")
    (task,) = cluster.pids("n2", "sleep 54321$")
    assert task not in cluster.pids("n1", "")
    assert cluster.pids("n3", "sleep 54321") == []
    os.kill(task, signal.SIGKILL)
    until(lambda: cluster.pids("n2", "sleep 54321$") == [], 5, lambda: "the task lives")


def test_orphans_die_with_their_step(cluster: Cluster, tmp_path: Path) -> None:
    job = _submit(
        cluster, tmp_path, "srun bash -c 'setsid sleep 54322 & sleep 54322 & kill -9 $$'; echo srun ended with $?"
    )
    cluster.wait(job, "COMPLETED", 45)
    assert "srun ended with 137" in (tmp_path / f"{job}.out").read_text()
    assert cluster.pids("n1", "sleep 54322") == []


def test_clear_ends_what_requeues_itself(cluster: Cluster, tmp_path: Path) -> None:
    job = _submit(cluster, tmp_path, "trap 'scontrol requeue $SLURM_JOB_ID' TERM\necho up\nsleep 300 & wait")
    until(lambda: (tmp_path / f"{job}.out").is_file() and bool(cluster.pids("n1", "sleep 300$")), 30, lambda: "not up")
    cluster.clear()
    assert cluster.job(job)["JobState"] == "CANCELLED"
    assert cluster.run("squeue", "-h") == ""


def test_settings_can_change(cluster: Cluster) -> None:
    assert "JobRequeue              = 1\n" in cluster.run("scontrol", "show", "config")
    cluster.reconfigure(JobRequeue=0)
    assert "JobRequeue              = 0\n" in cluster.run("scontrol", "show", "config")
    cluster.reconfigure()
    assert "JobRequeue              = 1\n" in cluster.run("scontrol", "show", "config")


def test_stop_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    with Cluster() as other:
        folder = other.folder
        job = _submit(other, tmp_path, "trap '' TERM; srun sleep 300", "--nodes=4")
        other.wait(job, "RUNNING", 30)
        other.crash("n3")
        wanted = _DAEMONS | {"slurmstepd"}
        until(lambda: _processes(folder) >= wanted, 30, lambda: f"only {_processes(folder)}")
        assert folder.is_dir()
    assert _processes(folder) == set()
    assert not folder.exists()
    assert str(folder) not in Path("/proc/self/mountinfo").read_text()
    # The one started first goes on.
    assert set(cluster.node_states().values()) == {"IDLE"}
    cluster.run("srun", "--nodes=4", "true")


def test_failed_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch, cluster: Cluster) -> None:
    failing = Cluster()
    monkeypatch.setitem(cluster_module._SETTINGS, "SelectType", "select/none_such")
    with pytest.raises(AssertionError, match=r"slurmctld has ended(?s:.*)fatal: Can't find plugin") as failure:
        failing.start()
    (folder,) = {Path(found) for found in re.findall(r"/tmp/lhcp-slurm-\w+", str(failure.value))}
    assert not folder.exists()
    assert _processes(folder) == set()


def test_killed_pytest_leaves_nothing(cluster: Cluster) -> None:
    code = "import time; from slurm.cluster import Cluster; print(Cluster().start().folder, flush=True); time.sleep(99)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert folder.is_dir()
        assert _processes(folder) >= _DAEMONS
        process.kill()
    until(lambda: not folder.exists() and _processes(folder) == set(), 5, lambda: f"{folder}: {_processes(folder)}")
