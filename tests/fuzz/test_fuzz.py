"""One short run on each database; `make fuzz` makes long ones."""

import os
import subprocess
import sys

import docker
import pytest

from tests.conftest import ROOT, missing


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_nothing_runs_twice_and_nothing_is_lost_while_workers_die_and_stall(
    request: pytest.FixtureRequest, engine: docker.DockerClient, database: str
) -> None:
    if database == "postgres" and "TEST_POSTGRES_URL" not in os.environ:
        missing(request.config, "PostgreSQL (TEST_POSTGRES_URL)")

    command = [sys.executable, "-m", "tests.fuzz", "--database", database, "--seeds", "2", "--jobs", "12"]
    run = subprocess.run([*command, "--storm", "12"], cwd=ROOT, capture_output=True, text=True, timeout=170)

    assert run.returncode == 0, run.stdout + run.stderr
