"""A SLURM for the tests of a file."""

import fcntl
import importlib.util
import tempfile
from pathlib import Path

import pytest
from cluster import Cluster, what_is_missing


@pytest.fixture(scope="module")
def cluster():
    if not importlib.util.find_spec("snakemake_executor_plugin_slurm"):
        pytest.skip("no snakemake-executor-plugin-slurm: install envs/requirements-slurm.txt")
    with open(Path(tempfile.gettempdir()) / "n4flow-slurm.lock", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # a machine has one SLURM at a time, and files of tests may run side by side
        if problem := what_is_missing():
            pytest.skip(problem)
        cluster = Cluster()
        try:
            cluster.__enter__()
        except TimeoutError as error:
            pytest.skip(f"SLURM does not start here: {error}")
        yield cluster
        cluster.__exit__()
