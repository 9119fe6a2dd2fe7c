"""The scripts that the launcher writes for a full site, and the golden files of them.

After a change that is meant, `python tests/golden/update.py` writes the files anew; look at the difference.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import yaml

from lhcp.config.validation import validate
from lhcp.data import prepare as prepare_data
from lhcp.launch.prepare import Prepared, Request, prepare
from lhcp.launch.site import Site

GOLDEN = Path(__file__).parent
SITE = """\
account: proj-17
partition: b200,b200-long
qos: high
reservation: maintenance window
constraint: "b200&nvme"
exclude: n[3,7]
gpus: --gres=gpu:b200:{n}
setup:
  - module load cuda/13.0
  - export PATH=/opt/venvs/lhcp/bin:$PATH
python: /opt/venvs/lhcp/bin/python
network_interface: ib0
env:
  NCCL_IB_HCA: mlx5_0,mlx5_1
  GREETING: it's "here"; a & b
sbatch:
  mail-user: a.user@example.org
  comment: 'say "hi" #1'
  spread-job: null
"""
CONTAINERS: dict[str, dict[str, Any]] = {
    "pyxis": {"runtime": "pyxis", "image": "registry.example.org#ml/torch:2.11", "mounts": ["/scratch:/scratch:ro"]},
    "apptainer": {"runtime": "apptainer", "image": "/images/my torch.sif", "mounts": ["/scratch"]},
}
NEEDS = {
    "latency": "run.yaml",
    "preflight": None,
    "recoverability": "grid.yaml",
    "sweep": "grid.yaml",
    "train_1m": "run.yaml",
    "train_98k": "run.yaml",
}
"""What each template is submitted with."""
CASES = [*((name, None) for name in NEEDS), ("train_1m", "pyxis"), ("train_98k", "apptainer")]
"""Template, and container."""


def run_values(data: Path, output_dir: Path) -> dict[str, Any]:
    """A small run that is legal on any number of processes that divides 32."""
    return {
        "output_dir": str(output_dir),
        "seq_len": 720,
        "global_batch_size": 32,
        "device": "cpu",
        "model": {"vocab_size": 257, "dim": 24, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6,
                  "ffn_dim": 40},
        "data": {"path": str(data)},
        "attention": {"num_levels": 3, "pooling_factor": 3, "topk": 64, "num_strata": 16},
        "stages": [{"mode": "lighthouse", "steps": 3}, {"mode": "dense", "steps": 2}],
    }  # fmt: skip


def write_inputs(folder: Path) -> None:
    """Data, a configuration and a grid."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = (json.dumps({"text": f"document {number} " * 40}) for number in range(40))
    (folder / "texts.jsonl").write_text("\n".join(texts))
    prepare_data([folder / "texts.jsonl"], folder / "data", held_out=0.3)
    values = run_values(folder / "data", folder / "runs" / "unused")
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    grid = {"config": str(folder / "run.yaml"), "arms": {"dense": {"seed": 1}, "lighthouse": {}},
            "vary": {"parallel.cp": [1, 8]}}  # fmt: skip
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))


def prepared(folder: Path, template: str, container: str | None, name: str) -> Prepared:
    """The job of one golden file, from the inputs in `folder`."""
    needed = NEEDS[template]
    site = yaml.safe_load(SITE) | ({"container": CONTAINERS[container]} if container else {})
    return prepare(
        Request(
            template=template,
            config=folder / needed if needed else None,
            out=folder / "runs" / name,
            options={"time": "2:00:00"} if template == "train_1m" else {},
            site=validate(Site, site),
        )
    )


def rendered(folder: Path) -> dict[str, str]:
    """Text of every golden file by name; what differs between machines is replaced."""
    write_inputs(folder)
    scripts = {}
    for template, container in CASES:
        name = f"{template}-{container}" if container else template
        text = prepared(folder, template, container, name).text
        scripts[f"{name}.sbatch"] = text.replace(str(folder / "runs"), "/RUNS").replace(str(folder / "data"), "/DATA")
    return scripts


def main() -> None:
    """Write the golden files, and remove those that are none any more."""
    with tempfile.TemporaryDirectory() as folder:
        scripts = rendered(Path(os.path.realpath(folder)))
    for path in GOLDEN.glob("*.sbatch"):
        path.unlink()
    for name, text in scripts.items():
        (GOLDEN / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
