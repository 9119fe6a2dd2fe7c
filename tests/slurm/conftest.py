"""The test cluster, started once, and cleared after every test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from slurm.cluster import Cluster, missing
from slurm.runs_on_slurm import Runs


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with Cluster() as started:
        yield started


@pytest.fixture(autouse=True)
def _cleared(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leaves no job, all nodes idle, and the settings of the start."""
    cluster: Cluster | None = request.getfixturevalue("cluster") if "cluster" in request.fixturenames else None
    yield
    if cluster is not None:
        cluster.clear()


@pytest.fixture(scope="session")
def runs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def expected(runs: Runs) -> list[float]:
    """The losses of a run that nothing happens to."""
    return runs.losses_alone()


@pytest.fixture
def login(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets this process submit to the cluster."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
