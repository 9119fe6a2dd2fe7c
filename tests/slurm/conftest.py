"""The test cluster, started once, and cleared after every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from slurm.cluster import Cluster, missing


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
