"""Every template at its full size, as it is: accepted by Slurm, with what it asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from lhcp.launch import script, submit
from lhcp.launch.prepare import Request, prepare
from lhcp.launch.site import load_site
from slurm.cluster import Cluster
from slurm.runs_on_slurm import Runs

pytestmark = pytest.mark.usefixtures("login")
SITE = """\
partition: gpu
account: physics
qos: null
constraint: b200
gpus: --gres=gpu:b200:{n}
sbatch: {comment: "it's a \\"test\\" of $(touch PWNED) #1", hold: null}
setup:
  - "module() { true; }"
  - module load cuda
network_interface: lo
"""
NODES = {"train_1m": 4, "preflight": 4}


@pytest.mark.parametrize("name", script.names())
def test_a_template_is_accepted_at_its_full_size(name: str, runs: Runs, cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(SITE)
    template = script.read(name)
    config = runs.config(name, checkpoint={})
    grid = tmp_path / "grid.yaml"
    grid.write_text(f"config: {config}\nvary: {{seed: [1, 2, 3]}}\n")
    request = Request(
        template=name,
        config={"config": config, "grid": grid, "nothing": None}[template.needs],
        overrides=["parallel.dp=null", "parallel.cp=1", "global_batch_size=32", "eval.sequences=0"],
        out=tmp_path / "out",
        site=load_site(tmp_path / "cluster.yaml"),
    )
    (job,) = submit.by_sbatch(prepare(request))
    shown = cluster.job(f"{job.job_id}_0" if template.needs == "grid" else job.job_id)
    nodes, gpus = NODES.get(name, 1), 1 if name == "latency" else 8
    assert shown["JobState"] == "PENDING"
    assert (shown["Partition"], shown["Account"], shown["Features"]) == ("gpu", "physics", "b200")
    assert shown["NumNodes"] in (f"{nodes}", f"{nodes}-{nodes}")
    assert shown["TresPerNode"] == f"gres:gpu:b200:{gpus}"
    assert shown["Requeue"] == ("0" if name == "preflight" else "1")
    assert shown["Comment"] == 'it\'s a "test" of $(touch PWNED) #1'
    assert job.elements == (3 if template.needs == "grid" else None)
    assert cluster.run("squeue", "--noheader", "--array", "--format=%i").count(job.job_id) == (job.elements or 1)
